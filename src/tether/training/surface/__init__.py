"""The surface of TRL and transformers around a trainer: names that are understood, done otherwise, or refused."""
