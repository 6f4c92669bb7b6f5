"""Models: loading a policy and its tokenizer, what a model is made of, and the fingerprint of its weights."""

from tether.models.fingerprint import fingerprint, model_fingerprint
from tether.models.load import load_config, load_policy, load_processing, load_tokenizer

__all__ = [
    "fingerprint",
    "load_config",
    "load_policy",
    "load_processing",
    "load_tokenizer",
    "model_fingerprint",
]
