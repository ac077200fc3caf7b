"""Searches: python launch/search.py IMAGE ... --gallery OUT [--top K] [--output FILE] [--json FILE] [KEY VALUE ...]."""

from reid.commands.main import exit_process, main

if __name__ == "__main__":
    exit_process(main("search", "Find the images of a gallery that are nearest to given ones, and draw them."))
