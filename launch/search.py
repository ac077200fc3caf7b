"""Search: python launch/search.py IMAGE ... --gallery OUT [--top K] [--output FILE] [--json FILE] [KEY VALUE ...]."""

from reid.commands.main import exit_process, main

if __name__ == "__main__":
    exit_process(main("search"))
