"""Prints the OUTPUT_DIR of a training, for job scripts: output_dir.py --config_file FILE [KEY VALUE ...]."""

import sys

from reid.launcher import print_output_dir

if __name__ == "__main__":
    sys.exit(print_output_dir())
