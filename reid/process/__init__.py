"""What every process needs before torch is imported: signals, log lines, environment, atomic files, text tables.

It may import only errors, and neither torch nor numpy.
"""
