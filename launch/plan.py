"""What a job script must know of its training: plan.py --nodes N --ranks_per_node R --config_file FILE [KEY VALUE ...].

Prints on how many of the job's nodes it runs, as ranks must share every batch evenly, and its OUTPUT_DIR.
"""

import sys

from reid.commands.main import print_plan

if __name__ == "__main__":
    sys.exit(print_plan())
