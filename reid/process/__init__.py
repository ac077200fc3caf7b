"""What a process has to do with its operating system: signals, log lines, its exit, and files.

It knows nothing of ranks, settings, tensors or images: its modules import only `reid.errors`, and neither torch nor
numpy, so that a command can fail before either is loaded.
"""
