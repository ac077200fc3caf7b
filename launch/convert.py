"""Takes the weights out of a whole pickled model: python launch/convert.py IN.pth OUT.pth."""

from reid.conversion import main
from reid.launcher import leave

if __name__ == "__main__":
    leave(main())
