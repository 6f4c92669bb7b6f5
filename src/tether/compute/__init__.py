"""Matrix products on a CPU, precision, memory and threads of a run."""
