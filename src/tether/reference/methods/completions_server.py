"""A client of OpenAI-compatible completions servers that return the log-probabilities of a prompt's tokens.

The key goes to the address that was given and nowhere else: redirects are refused, and no message repeats it. An answer
is read up to a length that its question bounds.
"""

from __future__ import annotations

import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx

from tether.errors import ConfigError, ReferencePolicyError
from tether.masking import masked
from tether.reference.spec import RemoteOptions

# Answers that another attempt may change.
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 10.0
# An answer must have ended after this many times the limit for one part of it: one byte now and then is none.
_WHOLE_ANSWER = 2
# An answer's bytes: for lists of models and what surrounds values, and for each token with its alternatives.
_ANSWER_BYTES, _TOKEN_BYTES = 2**20, 2**12


class CompletionsServer:
    """Asks a server for the log-probabilities of token ids; token ids are sent, never text.

    Args:
        options: address, name and limits.

    Raises:
        ReferencePolicyError: the server cannot be reached, or serves other models.
        ConfigError: the environment variable of the key is not set.
    """

    def __init__(self, options: RemoteOptions) -> None:
        self.options = options
        self._address = options.url.rstrip("/").removesuffix("/v1") + "/v1"
        self.url = masked(self._address)
        headers, self._key = {"Content-Type": "application/json", "Accept-Encoding": "identity"}, ""
        if options.api_key_env is not None:
            self._key = os.environ.get(options.api_key_env, "")
            if not self._key:
                raise ConfigError(f"remote: the environment variable {options.api_key_env} has no key. Set it.")
            if not self._key.isascii() or not self._key.isprintable():
                raise ConfigError(
                    f"remote: the key in {options.api_key_env} has a line break or another character that no header "
                    "may hold. Set it again, without."
                )
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            self._client = httpx.Client(
                headers=headers,
                timeout=options.timeout,
                follow_redirects=False,
                limits=httpx.Limits(max_connections=options.concurrency, max_keepalive_connections=options.concurrency),
            )
        except (ValueError, httpx.InvalidURL) as error:  # a proxy that the environment names
            raise ConfigError(f"remote: no connection can be made: {self._masked(error)}.") from None
        self.requests = 0
        self.card = self._find_model()
        self.model: str = self.card["id"]

    def token_logps(self, rows: list[list[int]]) -> list[list[float]]:
        """Log-probability of every token but the first of each sequence, given the tokens before it.

        Args:
            rows: token ids, at least two a row.

        Returns:
            For each row one nat value per token from the second on.

        Raises:
            ReferencePolicyError: the server fails for good, truncates, or does not give prompt log-probabilities.
        """
        if len(rows) == 1:
            return [self._row(rows[0])]
        with ThreadPoolExecutor(min(self.options.concurrency, len(rows))) as pool:
            return list(pool.map(self._row, rows))

    def _row(self, ids: list[int]) -> list[float]:
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        answer = self._ask("/completions", body)
        try:
            found = answer["choices"][0].get("prompt_logprobs")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ReferencePolicyError(
                f"{self._who()} answered in another form than a completion: {self._masked(answer)[:200]}"
            ) from error
        if not isinstance(found, list):
            raise ReferencePolicyError(
                f"{self._who()} gives no prompt log-probabilities: `prompt_logprobs` was asked for and is not in its "
                "answer. Use a server that has them, such as vLLM, and allow them there (--max-logprobs)."
            )
        if len(found) != len(ids):
            raise ReferencePolicyError(
                f"{self._who()} answered for {len(found)} of {len(ids)} tokens: it truncates or changes the prompt. "
                "Serve the model with a context of at least max_length + 1 tokens and without truncation."
            )
        # The first token has no value: nothing comes before it.
        return [self._value(found[place], ids[place], place) for place in range(1, len(ids))]

    def _value(self, entry: Any, token: int, place: int) -> float:
        one = entry.get(str(token)) if isinstance(entry, dict) else None
        if one is None:
            raise ReferencePolicyError(
                f"{self._who()} has no log-probability for token {token} at place {place}, but for "
                f"{list(entry) if isinstance(entry, dict) else entry!r}: it reads other tokens than were sent."
            )
        value = one.get("logprob") if isinstance(one, dict) else one
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value > 1e-3:
            raise ReferencePolicyError(
                f"{self._who()} gives {value!r} for token {token}, which is not a log-probability."
            )
        return float(value)

    def _find_model(self) -> dict[str, Any]:
        listed = self._ask("/models", None)
        try:
            cards = {card["id"]: card for card in listed["data"]}
        except (KeyError, TypeError) as error:
            raise ReferencePolicyError(
                f"{self.url}/models answered in another form than a list: {self._masked(listed)[:200]}"
            ) from error
        name = self.options.model
        if name is None and len(cards) == 1:
            return next(iter(cards.values()))
        if name is None or name not in cards:
            raise ReferencePolicyError(
                f"The server at {self.url} serves {', '.join(cards) or 'nothing'}, and "
                + ("no name was asked for" if name is None else f"{name} was asked for")
                + ". Give one of these names as `model` of the remote reference, or serve the right model."
            )
        return cards[name]

    def _ask(self, path: str, body: dict[str, Any] | None) -> Any:
        """One request, repeated with growing pauses while its failure may pass."""
        most = _ANSWER_BYTES + _TOKEN_BYTES * len((body or {}).get("prompt", ()))
        pause, reason, attempt = _FIRST_PAUSE, "", 0
        for attempt in range(self.options.retries + 1):
            if attempt:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            self.requests += 1
            try:
                status, text = self._sent(path, body, most)
                if status == httpx.codes.OK:
                    return json.loads(text)
                reason = f"{status} {text.decode('utf-8', 'replace')[:300]}"
                if status not in _PASSING:
                    break
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
        raise ReferencePolicyError(
            f"The server at {self.url}{path} failed after {attempt + 1} attempts: {self._masked(reason)}. Check that "
            "it runs, that its context holds max_length + 1 tokens, and that its vocabulary is the policy's."
        )

    def _sent(self, path: str, body: dict[str, Any] | None, most: int) -> tuple[int, bytes]:
        """Status and content of one answer."""
        text, latest = bytearray(), time.monotonic() + _WHOLE_ANSWER * self.options.timeout
        with self._client.stream("GET" if body is None else "POST", self._address + path, json=body) as answer:
            if answer.is_redirect:
                to = answer.headers.get("location", "elsewhere")
                return answer.status_code, f"it redirects to {to}, which is not followed; give that address".encode()
            # Not unpacked: a small answer that is packed can be a large one, and none was asked for.
            for piece in answer.iter_raw():
                text += piece
                if time.monotonic() > latest:
                    raise httpx.ReadTimeout(f"the answer had not ended {_WHOLE_ANSWER * self.options.timeout:g} s on")
                if len(text) > most:
                    raise ReferencePolicyError(
                        f"{self.url}{path} answered with more than {most} bytes, and no answer to this question is "
                        "that long. Check what runs at that address."
                    )
        return answer.status_code, bytes(text)

    def _masked(self, words: object) -> str:
        """Words without the key, which a server may repeat."""
        return masked(str(words).replace(self._key, "[key]") if self._key else str(words))

    def _who(self) -> str:
        return f"The model {self.model!r} served at {self.url}"
