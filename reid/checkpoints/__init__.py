"""Files of weights and of training states: saving, loading, pretrained weights, recorded settings.

It may import tracking (for checkpoints stored there), evaluation and every package below them.
"""
