"""The directory of a run: its files, which start may write them, checks before it begins, and its progress.

It may import models, distributed and every package below them.
"""
