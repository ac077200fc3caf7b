"""The command `check`: measure the ranks, network, disk and speed of a training before it starts.

`report` collects problems and figures, `trial` times the first steps.
"""
