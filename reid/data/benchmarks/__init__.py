"""Readers of public benchmarks and of tables: name -> train, query and gallery.

`catalogue` opens a benchmark by name, `sources` holds origins and documented counts, `splits` and `folders` what all
readers share.
"""
