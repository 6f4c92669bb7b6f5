"""JSON over HTTP to a model server: a key that goes nowhere else, growing pauses, answers of bounded length.

The key goes to the address that was given and nowhere else: redirects are refused, and no message repeats it. An answer
is read up to a length that its question bounds.
"""

from __future__ import annotations

import json
import os
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx2 as httpx

from tether.errors import ConfigError, ReferencePolicyError, TetherError
from tether.redact import masked
from tether.reference.spec import RemoteOptions

# Answers that another attempt may change.
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 10.0
# An answer must have ended after this many times the limit for one part of it: one byte now and then is none.
_WHOLE_ANSWER = 2
# What an answer may have at least: lists of models, and what surrounds values.
ANSWER_BYTES = 2**20
Question = TypeVar("Question")


class Transport:
    """Asks one server.

    Args:
        options: address, key and limits.
        what: is served, for messages.
        error: what is raised when the server fails for good.
        hint: what to check then.

    Raises:
        ConfigError: the environment variable of the key is not set, or no connection can be made.
    """

    def __init__(
        self,
        options: RemoteOptions,
        what: str = "remote",
        error: type[TetherError] = ReferencePolicyError,
        hint: str = "Check that it runs, that its context holds max_length + 1 tokens, and that its vocabulary is the "
        "policy's.",
    ) -> None:
        self.options, self._error, self._hint = options, error, hint
        self._root = options.url.rstrip("/").removesuffix("/v1")
        self.url = masked(self._root + "/v1")
        headers, self._key = {"Content-Type": "application/json", "Accept-Encoding": "identity"}, ""
        if options.api_key_env is not None:
            self._key = os.environ.get(options.api_key_env, "")
            if not self._key:
                raise ConfigError(f"{what}: the environment variable {options.api_key_env} has no key. Set it.")
            if not self._key.isascii() or not self._key.isprintable():
                raise ConfigError(
                    f"{what}: the key in {options.api_key_env} has a line break or another character that no header "
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
        except (ValueError, httpx.InvalidURL) as failure:  # a proxy that the environment names
            raise ConfigError(f"{what}: no connection can be made: {self.masked(failure)}.") from None
        weakref.finalize(self, self._client.close)  # sockets of a reference that is dropped without `close`
        self.requests = 0

    def ask(
        self,
        path: str,
        body: dict[str, Any] | None,
        *,
        most: int = ANSWER_BYTES,
        repeat: bool = True,
        control: bool = False,
        text: bool = False,
    ) -> Any:
        """One request, repeated with growing pauses while its failure may pass.

        Args:
            path: after `/v1`, or after the address itself for what is no part of the OpenAI protocol.
            body: of a POST; None: a GET.
            most: bytes that an answer may have.
            repeat: whether another attempt may be made, as a change of the server's state must not be made twice.
            control: the path follows the address itself, and its answer may be empty or no JSON.
            text: the same of the answer alone.

        Raises:
            TetherError: as the constructor was told, when the server fails for good.
        """
        pause, reason, attempt = _FIRST_PAUSE, "", 0
        address = self._root + ("" if control else "/v1") + path
        for attempt in range((self.options.retries if repeat else 0) + 1):
            if attempt:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            self.requests += 1
            try:
                status, answer = self._sent(address, body, most)
                if status == httpx.codes.OK:
                    return _parsed(answer) if control or text else json.loads(answer)
                reason = f"{status} {answer.decode('utf-8', 'replace')[:300]}"
                if status not in _PASSING:
                    break
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
        raise self._error(
            f"The server at {masked(address)} failed after {attempt + 1} attempts: {self.masked(reason)}. {self._hint}"
        )

    def many(self, call: Any, questions: list[Question]) -> list[Any]:
        """A call for each question, several under way at once; in the order of the questions."""
        if len(questions) == 1:
            return [call(questions[0])]
        with ThreadPoolExecutor(min(self.options.concurrency, max(1, len(questions)))) as pool:
            return list(pool.map(call, questions))

    def find_model(self) -> dict[str, Any]:
        """What the server says of the model that was named, or of its only one.

        Raises:
            TetherError: as the constructor was told: it serves other models.
        """
        listed = self.ask("/models", None)
        try:
            cards = {card["id"]: card for card in listed["data"]}
        except (KeyError, TypeError) as error:
            raise self._error(
                f"{self.url}/models answered in another form than a list: {self.masked(listed)[:200]}"
            ) from error
        name = self.options.model
        if name is None and len(cards) == 1:
            return next(iter(cards.values()))
        if name is None or name not in cards:
            raise self._error(
                f"The server at {self.url} serves {', '.join(cards) or 'nothing'}, and "
                + ("no name was asked for" if name is None else f"{name} was asked for")
                + ". Give one of these names as `model`, or serve the right model."
            )
        return cards[name]

    def close(self) -> None:
        """Give connections back."""
        self._client.close()

    def _sent(self, address: str, body: dict[str, Any] | None, most: int) -> tuple[int, bytes]:
        """Status and content of one answer."""
        text, latest = bytearray(), time.monotonic() + _WHOLE_ANSWER * self.options.timeout
        with self._client.stream("GET" if body is None else "POST", address, json=body) as answer:
            if answer.is_redirect:
                to = answer.headers.get("location", "elsewhere")
                return answer.status_code, f"it redirects to {to}, which is not followed; give that address".encode()
            # Not unpacked: a small answer that is packed can be a large one, and none was asked for.
            for piece in answer.iter_raw():
                text += piece
                if time.monotonic() > latest:
                    raise httpx.ReadTimeout(f"the answer had not ended {_WHOLE_ANSWER * self.options.timeout:g} s on")
                if len(text) > most:
                    raise self._error(
                        f"{masked(address)} answered with more than {most} bytes, and no answer to this question is "
                        "that long. Check what runs at that address."
                    )
        return answer.status_code, bytes(text)

    def masked(self, words: object) -> str:
        """Words without the key, which a server may repeat."""
        return masked(str(words).replace(self._key, "[key]") if self._key else str(words))


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text.decode("utf-8", "replace")
