"""Searches: python launch/search.py IMAGE ... --gallery OUT [--top K] [--output FILE] [--json FILE] [KEY VALUE ...]."""

import sys

from reid.launcher import main

if __name__ == "__main__":
    sys.exit(main("search", "Find the images of a gallery that are nearest to given ones, and draw them."))
