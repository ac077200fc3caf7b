"""The training: assembly (`build`), run (`train`), step, criterion, and everything that acts on an event.

It may import tracking, checkpoints and every package below them. Only commands import it.
"""
