"""Places of tokenizers that it does not document; read in tokenizers 0.23.3."""

from __future__ import annotations

import json
from typing import Any


def description(backend: Any) -> dict[str, Any]:
    """What a `tokenizers.Tokenizer` is made of, as `tokenizer.json` has it, whose layout is written down nowhere."""
    return json.loads(backend.to_str())
