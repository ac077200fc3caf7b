"""Print settings with their documentation: python launch/settings.py [PREFIX] [--markdown]."""

from reid.commands.main import exit_process
from reid.commands.settings import main

if __name__ == "__main__":
    exit_process(main())
