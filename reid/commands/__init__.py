"""Commands: one module each, from arguments to settings, ranks and work.

`main` starts every command (entry point `reid`, `launch/*.py`), `arguments` parses the command line without torch, and
`api` holds train and evaluate for Python programs. Nothing in the package may be imported by another one.
"""
