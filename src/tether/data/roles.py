"""Who says each token of a row: the roles of a conversation, for `tether data show`.

A template is a program, so the conversation is rendered up to each message, and what that has in common with the whole,
in tokens, is where the message ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from tether.data.text.template import Writer, conversation, opening
from tether.data.text.tokenize import Encoder
from tether.errors import DataError
from tether.types import Messages, Preference

Roles = list[str]


def roles_of(
    record: Preference,
    prompt_ids: list[int],
    completion_ids: Sequence[list[int]],
    encoder: Encoder,
    template: str,
    image_token: int | None = None,
) -> list[Roles]:
    """The role of every token of a row that nothing was cut from.

    Args:
        record: the row; a conversation.
        prompt_ids: of its prompt.
        completion_ids: of each completion.
        encoder: what made them.
        template: the chat template.
        image_token: id of the token that stands for a part of an image, of which the text of a prompt has one only.

    Returns:
        For the prompt, then for each completion, one role per token. What a template writes to open the answer is the
        assistant's. A message at which the template refuses to stop has no end of its own: its tokens are given to the
        next one.
    """
    ends = _Ends(record, encoder, template, image_token)
    answers = ["assistant"] if opening(record) else [""]
    found = [_filled(ends.of(cast(Messages, record.prompt), prompt_ids), len(prompt_ids), answers[0])]
    for k, ids in enumerate(completion_ids):
        whole = conversation(record, k)
        marks = [(end - len(prompt_ids), role) for end, role in ends.of(whole, [*prompt_ids, *ids])]
        last = whole[-1]["role"]
        found.append(_filled([mark for mark in marks[:-1] if mark[0] > 0], len(ids), last))
    return found


class _Ends:
    """Where the messages of a conversation end, in tokens."""

    def __init__(self, record: Preference, encoder: Encoder, template: str, image_token: int | None) -> None:
        self.record, self.encoder, self.image_token = record, encoder, image_token
        self.write = Writer(encoder.tokenizer, template, "row")

    def of(self, messages: Messages, ids: list[int]) -> list[tuple[int, str]]:
        """The end of each message in `ids`, and its role."""
        whole = self._once_per_image(ids)
        found = []
        for place, message in enumerate(messages):
            try:
                text = self.write([(self.record, messages[: place + 1], "")])[0]
            except DataError:
                continue
            own = self._once_per_image(self.encoder.opened(self.encoder.encode([text])[0]))
            shared = next((n for n, (a, b) in enumerate(zip(own, whole, strict=False)) if a[0] != b[0]), None)
            shared = min(len(own), len(whole)) if shared is None else shared
            if any(token == self.encoder.end for token, _ in own[shared:]):
                # The template writes the last message differently than one in the middle (Qwen 3's thoughts): what
                # follows the place where the two part, up to the end of the turn, is the message's.
                after = (n for n in range(shared, len(whole)) if whole[n][0] == self.encoder.end)
                shared = next(after, shared - 1) + 1
            found.append((whole[shared - 1][1] if shared else 0, message["role"]))
        return found

    def _once_per_image(self, ids: list[int]) -> list[tuple[int, int]]:
        """The ids with the place after each, and one for all the tokens of an image."""
        kept: list[tuple[int, int]] = []
        for place, token in enumerate(ids, 1):
            if token == self.image_token and kept and kept[-1][0] == token:
                kept[-1] = token, place
            else:
                kept.append((token, place))
        return kept


def _filled(marks: list[tuple[int, str]], length: int, rest: str) -> Roles:
    roles: Roles = []
    for end, role in marks:
        roles += [role] * (min(end, length) - len(roles))
    return roles + [rest or (roles[-1] if roles else "")] * (length - len(roles))
