"""Everything that knows there is more than one process: ranks, collectives, SyncBN, accelerate, the watchdog.

Only this package imports torch.distributed, ignite.distributed and accelerate. It may import config and every package
below it.
"""
