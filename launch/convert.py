"""Takes the weights out of a whole pickled model: python launch/convert.py IN.pth OUT.pth."""

from reid.commands.convert import main
from reid.commands.main import leave

if __name__ == "__main__":
    leave(main())
