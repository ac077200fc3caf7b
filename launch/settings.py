"""Print settings with their documentation: python launch/settings.py [PREFIX] [--markdown]."""

import sys

from reid.commands.settings import main

if __name__ == "__main__":
    sys.exit(main())
