"""What is known of a model before its weights are read: what it is made of, and what its rows may be at most."""
