"""Of sampled completions: advantages, the divergence from the reference, corrections, and the loss of a micro-batch."""
