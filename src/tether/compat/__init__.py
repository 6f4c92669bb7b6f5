"""Private and undocumented places of libraries, one function each, with why it is used and where it was read.

Nothing else in the package may touch a private name of a library. `tests/compat/` holds each of these against the
installed version, so that a library that moves fails a test that says which place moved.
"""
