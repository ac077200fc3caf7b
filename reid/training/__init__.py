"""Training: the assembly (`build`), the run (`train`), the step and its criterion, and what acts on each event.

It may import tracking, checkpoints and every package below them. Only commands import it.
"""
