"""Training: one assembly of model, data, losses and optimizer (`build`), and the run around it (`train`).

It may import tracking, checkpoints and all packages below them; only commands may import it.
"""
