"""A client of OpenAI-compatible completions servers that return the log-probabilities of a prompt's tokens."""

from __future__ import annotations

import math
from typing import Any

from tether.errors import ReferencePolicyError, TetherError
from tether.reference.methods.transport import ANSWER_BYTES, Transport
from tether.reference.spec import RemoteOptions

# An answer's bytes for each token with its alternatives.
TOKEN_BYTES = 2**12


class CompletionsServer:
    """Asks a server for the log-probabilities of token ids; token ids are sent, never text.

    Args:
        options: address, name and limits.
        error: what is raised when the server fails for good, or answers wrongly.

    Raises:
        ReferencePolicyError: the server cannot be reached, or serves other models.
        ConfigError: the environment variable of the key is not set.
    """

    def __init__(self, options: RemoteOptions, error: type[TetherError] = ReferencePolicyError) -> None:
        self.transport, self._error = Transport(options, error=error), error
        self.options, self.url = options, self.transport.url
        self.card = self.transport.find_model()
        self.model: str = self.card["id"]

    @property
    def requests(self) -> int:
        """Sent so far."""
        return self.transport.requests

    def token_logps(self, rows: list[list[int]]) -> list[list[float]]:
        """Log-probability of every token but the first of each sequence, given the tokens before it.

        Args:
            rows: token ids, at least two a row.

        Returns:
            For each row one nat value per token from the second on.

        Raises:
            ReferencePolicyError: the server fails for good, truncates, or does not give prompt log-probabilities.
        """
        return self.transport.many(self._row, rows)

    def _row(self, ids: list[int]) -> list[float]:
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        answer = self.transport.ask("/completions", body, most=ANSWER_BYTES + TOKEN_BYTES * len(ids))
        try:
            found = answer["choices"][0].get("prompt_logprobs")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise self._error(
                f"{self._who()} answered in another form than a completion: {self.transport.masked(answer)[:200]}"
            ) from error
        if not isinstance(found, list):
            raise self._error(
                f"{self._who()} gives no prompt log-probabilities: `prompt_logprobs` was asked for and is not in its "
                "answer. Use a server that has them, such as vLLM, and allow them there (--max-logprobs)."
            )
        if len(found) != len(ids):
            raise self._error(
                f"{self._who()} answered for {len(found)} of {len(ids)} tokens: it truncates or changes the prompt. "
                "Serve the model with a context of at least max_length + 1 tokens and without truncation."
            )
        # The first token has no value: nothing comes before it.
        return [self._value(found[place], ids[place], place) for place in range(1, len(ids))]

    def _value(self, entry: Any, token: int, place: int) -> float:
        one = entry.get(str(token)) if isinstance(entry, dict) else None
        if one is None:
            raise self._error(
                f"{self._who()} has no log-probability for token {token} at place {place}, but for "
                f"{list(entry) if isinstance(entry, dict) else entry!r}: it reads other tokens than were sent."
            )
        value = one.get("logprob") if isinstance(one, dict) else one
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value > 1e-3:
            raise self._error(f"{self._who()} gives {value!r} for token {token}, which is not a log-probability.")
        return float(value)

    def _who(self) -> str:
        return f"The model {self.model!r} served at {self.url}"
