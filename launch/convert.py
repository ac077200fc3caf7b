"""Takes the weights out of a whole pickled model: python launch/convert.py IN.pth OUT.pth."""

import sys

from reid.conversion import main

if __name__ == "__main__":
    sys.exit(main())
