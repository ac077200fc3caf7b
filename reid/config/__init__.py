"""Settings: one table, its validators, the rules between settings, reading and writing them.

`schema` lists every setting, `load` turns files and command lines into the frozen tree, `parsing` and `validators` help
both. `rules` holds what settings mean together, `benchmark_names` the names of benchmarks. The package imports only the
standard library, PyYAML, yacs and `reid.errors`, never torch or numpy; every other module may import it.
"""
