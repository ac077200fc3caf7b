"""Signals, log lines, environment, atomic files and text tables: used by every process before torch is imported.

It may import only errors, and neither torch nor numpy.
"""
