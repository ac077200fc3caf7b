"""The command `check`: what a training would find on these machines, measured before it starts.

`report` collects problems and figures, `trial` times the first steps.
"""
