"""Data: benchmarks on disk, the store of decoded images, which rank sees which sample, augmentation, batches.

`samplers` and `augment` are pure: functions of (seed, epoch, position). The package may import models, distributed and
every package below them.
"""
