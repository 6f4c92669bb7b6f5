"""One file for each algorithm: what it needs, its loss, its trainer."""
