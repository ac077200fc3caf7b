"""Readers of public benchmarks and of tables: name -> train, query and gallery.

`catalogue` opens a benchmark by name, `splits` holds what all readers share, `sources` the documented counts.
"""
