"""Secrets taken out of what is printed or written: passwords in addresses, hub tokens, keys in queries (INV-51)."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "[hidden]"
# `scheme://user:password@host`, or a token alone before the host.
_LOGIN = re.compile(r"(?<=://)[^/\s@'\"]+@")
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,})")
_QUERY = re.compile(
    r"(?i)([?&](?:[\w.-]*(?:token|signature|password|secret|api_?key|credential)[\w.-]*|sig|key)=)[^&#\s'\"]+"
)
# Keys of options whose value is a secret whatever it looks like.
_KEYS = (
    "hub_token",
    "push_to_hub_token",
    "api_key",
    "password",
    "secret",
    "access_token",
    "auth_token",
    "client_secret",
)
# Words in the name of a variable that holds a secret.
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def is_secret(name: str) -> bool:
    """Whether a variable of the environment holds a secret, by its name.

    >>> is_secret("HF_TOKEN"), is_secret("WANDB_APIKEY"), is_secret("TOKENIZERS_PARALLELISM")
    (True, True, False)
    """
    return any(part.endswith(_SECRET) for part in name.upper().split("_"))


def masked(text: str) -> str:
    """A text without the secrets in it.

    Example:
        >>> masked("read from https://me:pass@example.org/rows.jsonl?sig=abc&x=1")
        'read from https://[hidden]@example.org/rows.jsonl?sig=[hidden]&x=1'
    """
    return _TOKEN.sub(HIDDEN, _QUERY.sub(rf"\1{HIDDEN}", _LOGIN.sub(f"{HIDDEN}@", text)))


def masked_values(value: Any) -> Any:
    """The same for everything in mappings and lists; what stands under the name of a secret becomes None.

    Example:
        >>> masked_values({"hub_token": "x", "data": ["s3://key:secret@bucket/rows"], "beta": 0.1})
        {'hub_token': None, 'data': ['s3://[hidden]@bucket/rows'], 'beta': 0.1}
    """
    if isinstance(value, dict):
        return {key: None if key in _KEYS else masked_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [masked_values(item) for item in value]
    return masked(value) if isinstance(value, str) else value
