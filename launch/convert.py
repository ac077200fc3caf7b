"""Extract the weights of a pickled model: python launch/convert.py IN.pth OUT.pth."""

from reid.commands.convert import main
from reid.commands.main import exit_process

if __name__ == "__main__":
    exit_process(main())
