"""Print what a job script must know of its training: the number of nodes that it uses, and its OUTPUT_DIR.

plan.py --nodes N --ranks_per_node R --config_file FILE [KEY VALUE ...]. All ranks share every batch evenly.
"""

import sys

from reid.commands.main import print_plan

if __name__ == "__main__":
    sys.exit(print_plan())
