"""Settings: one table, its validators, the rules between settings, reading and writing them.

Read `schema` for what can be set, `load` for how it is read. `parsing` and `validators` serve these two, `rules` says
what settings mean together, `benchmark_names` what a benchmark may be called. Everything here answers before torch is
imported: it imports the standard library, PyYAML, yacs and `reid.errors`; any module of reid may import it.
"""
