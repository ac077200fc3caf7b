"""Weights & Biases and TensorBoard: rows, pictures, tables and artifacts; rank 0 acts.

Its failures never stop a training. Only this package (and the command `sweep`) imports wandb. It may import evaluation
and every package below it.
"""
