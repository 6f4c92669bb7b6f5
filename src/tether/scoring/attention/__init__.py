"""Tree attention: how transformers calls it, and the backends that compute it."""
