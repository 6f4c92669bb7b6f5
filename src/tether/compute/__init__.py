"""In what a run computes: the library of CPU products."""
