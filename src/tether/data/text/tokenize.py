"""From text to token ids with an exact prompt boundary. Called by `prepare`.

For well-formed rows the ids equal those of TRL 1.16's DPO trainer. They differ on purpose in these places:

- The end-of-turn token is the last token of a completion. TRL keeps what a template writes after it (ChatML's newline),
  which no model is ever asked to generate.
- A template that closes an answer with no special token gets the tokenizer's end-of-sequence token, once.
- A beginning-of-sequence token that the text brings itself is not added a second time, and an end-of-sequence token
  that the tokenizer adds by itself does not end the prompt or double the end of the completion.
- Where ids(prompt) is not a prefix of ids(prompt + completion), TRL gives the prompt's last tokens to the completions.
  Here `boundary` decides; by default the prompt keeps the ids it has at inference, and the completion is tokenised on
  its own. Two boundaries are no one's request and move as in TRL, to where the ids part: that of a prompt which is only
  what both texts share, and that of a template which renders a prompt differently than the conversation it begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tether.data.text.answer_end import Closings
from tether.data.text.render import Rendered
from tether.data.text.template import Writer, chat_template, text_tokenizer
from tether.data.text.token_cache import WordMemory
from tether.errors import DataError

Boundary = Literal["split", "drop", "error"]
BOUNDARIES: tuple[Boundary, ...] = ("split", "drop", "error")
_ANCHOR = "\n"


@dataclass(frozen=True)
class Tokenized:
    """A rendered row as token ids.

    Args:
        prompt_ids: ids of the prompt.
        completion_ids: K lists; each ends in the end-of-turn token, which is in it no second time at the end.
        source_row: number of the row in the data it came from, from 0.
        boundary: `exact`: ids(prompt) is a prefix of ids(prompt + completion) for all completions; `split`: it is not,
            and the completions concerned were tokenised on their own; `shared`: the prompt is what the ids of both
            texts share, as the data gave no boundary; `template`: the same, as the template does not round-trip.
        ends_added: completions whose template wrote no end-of-turn token, so that one was added.
        dropped: why the row cannot be used; None for a row that can.
        scored: for each completion, True for tokens that are scored; None when all are.
    """

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    source_row: int
    boundary: Literal["exact", "split", "shared", "template"] = "exact"
    ends_added: int = 0
    dropped: Literal["boundary", "empty_prompt"] | None = None
    scored: list[list[bool]] | None = None


class Encoder:
    """A tokenizer with what it does around a text made explicit.

    Args:
        tokenizer: any transformers tokenizer; a fast one is far quicker.
        template: chat template of conversational rows; None for text.
        name: what to call the rows in messages.

    Raises:
        DataError: neither the template nor the tokenizer says how a completion ends.

    Attributes:
        prefix: ids that the tokenizer puts before a text, such as the beginning-of-sequence token.
        end: id of the end-of-turn token that an answer gets where none is written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, template: str | None = None, name: str = "data") -> None:
        self.tokenizer = tokenizer
        self.name = name
        self._words = WordMemory.of(tokenizer, self._plain)
        self.prefix = [] if template is not None else self._learned_prefix()
        self.end = self._learned_end(template)
        # SentencePiece writes a space before a text on its own ("world" gives the ids of " world").
        alone, after = self.encode(["a", _ANCHOR + "a"])
        self.needs_anchor = after[len(self.encode([_ANCHOR])[0]) :] != alone

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, without any that the tokenizer would add around them."""
        if self._words is not None and texts:
            found = self._words.encode(texts)
            if found is not None:
                return found
            self._words = None
        return self._plain(texts)

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return cast(list[list[int]], encoded["input_ids"])

    def opened(self, ids: list[int]) -> list[int]:
        """Ids of a whole text as the model is given it: with the tokenizer's prefix, and with one BOS at most."""
        if self.prefix and ids[: len(self.prefix)] != self.prefix:
            ids = self.prefix + ids
        bos = self.tokenizer.bos_token_id
        start = 0
        while bos is not None and ids[start : start + 2] == [bos, bos]:
            start += 1
        return ids[start:]

    def continuation(self, text: str) -> list[int]:
        """Ids of a text that follows another one, tokenised on its own."""
        if self.needs_anchor:
            anchor, both = self.encode([_ANCHOR, _ANCHOR + text])
            if both[: len(anchor)] == anchor:
                return both[len(anchor) :]
        return self.encode([text])[0]

    def without_end(self, text: str) -> str:
        """A text without the end-of-sequence tokens that it already brings."""
        eos = cast(str | None, self.tokenizer.eos_token)
        while eos and text.endswith(eos):
            text = text[: -len(eos)]
        return text

    def ended(self, ids: list[int], *, templated: bool, closed: bool) -> tuple[list[int], bool]:
        """Ids of a completion with exactly one end-of-turn token at its end; and whether it was missing.

        Args:
            ids: of the completion.
            templated: a chat template wrote it.
            closed: its last token is an end of turn that the template wrote.
        """
        end = ids[-1] if closed and ids else self.end
        stop = len(ids)
        while stop and ids[stop - 1] == end:
            stop -= 1
        return [*ids[:stop], end], templated and stop == len(ids)

    def all_ended(self, row: Rendered, completions: Sequence[list[int]]) -> list[tuple[list[int], bool]]:
        """The completions of a row, each as `ended` makes it."""
        closed = row.closed or (False,) * len(completions)
        return [
            self.ended(ids, templated=row.templated, closed=one) for ids, one in zip(completions, closed, strict=True)
        ]

    def _learned_prefix(self) -> list[int]:
        bare = self.encode(["a"])[0]
        full = cast(list[int], self.tokenizer("a", verbose=False)["input_ids"])
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return full[:start]
        return full[:1] if full[:1] == [self.tokenizer.bos_token_id] else []

    def _learned_end(self, template: str | None) -> int:
        said = None if template is None else Closings(Writer(self.tokenizer, template, self.name)).said
        # Of a template that leaves the last answer open, what ends the others.
        end = "" if said is None else said.end or said.inside
        if end:
            return self.encode([end])[0][-1]
        eos = self.tokenizer.eos_token_id
        if not isinstance(eos, int):
            closes = "and its chat template closes an answer with no special token" if template is not None else ""
            raise DataError(
                f"{self.name}: the tokenizer has no end-of-sequence token {closes}".rstrip()
                + ", so a model could not learn where a completion ends. Set tokenizer.eos_token to the one the model "
                "was trained with."
            )
        return eos


def answer_end(processing: PreTrainedTokenizerBase | ProcessorMixin, *, name: str = "data") -> int:
    """The token with which a chat template ends an answer; where it writes none, the tokenizer's end of sequence.

    Raises:
        DataError: there is no template, or nothing says how an answer ends.
    """
    return Encoder(text_tokenizer(processing), template=chat_template(processing, name=name), name=name).end


def tokenize(rows: Sequence[Rendered], encoder: Encoder, *, boundary: Boundary = "split") -> list[Tokenized]:
    """Turn rendered rows into ids; every distinct prompt and text among them is tokenised once, all in one call.

    Args:
        rows: a batch.
        encoder: the tokenizer.
        boundary: what to do with a row where ids(prompt) is not a prefix of ids(prompt + completion), although the data
            or the template gives the boundary: `split` tokenises that completion on its own, `drop` marks the row as
            dropped, `error` raises.

    Returns:
        One result per row, in order, those that cannot be used marked as dropped.

    Raises:
        DataError: `boundary="error"` and a boundary is not exact.
    """
    texts = [row.texts if row.templated else tuple(map(encoder.without_end, row.texts)) for row in rows]
    distinct = list(
        dict.fromkeys(text for row, own in zip(rows, texts, strict=True) for text in (row.prompt, *own, *_cuts(row)))
    )
    ids = dict(zip(distinct, map(encoder.opened, encoder.encode(distinct)), strict=True))
    return [_row(row, own, ids, encoder, boundary) for row, own in zip(rows, texts, strict=True)]


def _row(
    row: Rendered, own: Sequence[str], ids: Mapping[str, list[int]], encoder: Encoder, boundary: Boundary
) -> Tokenized:
    texts = [ids[text] for text in own]
    prompt = [] if row.whole else ids[row.prompt]
    shared = min((_common(prompt, text) for text in texts), default=len(prompt))
    kind: Literal["exact", "split", "shared", "template"] = "exact"
    if not row.given_boundary:
        kind, prompt = "shared", prompt[:shared]
    elif shared < len(prompt) or row.moved:
        kind = "template" if row.moved else "split"
        if boundary == "error":
            raise DataError(_boundary_message(row, prompt, shared, encoder))
        if boundary == "drop":
            return Tokenized(prompt, texts, row.source_row, kind, dropped="boundary")
        if kind == "template":
            prompt = prompt[:shared]
    completions = []
    for text, alone in zip(texts, row.completions, strict=True):
        fits = text[: len(prompt)] == prompt
        completions.append(text[len(prompt) :] if fits else encoder.continuation(_alone(row, alone, encoder)))
    masks = _masks(row, ids, completions, encoder)
    if row.whole:
        # Nothing predicts the first token of a text, so it is the prompt.
        prompt, completions = completions[0][:1], [completions[0][1:]]
    if not prompt:
        bos = encoder.tokenizer.bos_token_id
        if not isinstance(bos, int):
            return Tokenized(prompt, completions, row.source_row, kind, dropped="empty_prompt")
        prompt = [bos]
    ended = encoder.all_ended(row, completions)
    if masks is not None:
        # An end that was added, or took the place of what was cut off, is scored as the last token of the text is.
        masks = [
            [*mask[: len(text) - 1], mask[min(len(text), len(mask)) - 1]]
            for mask, (text, _) in zip(masks, ended, strict=True)
        ]
    added = sum(added for _, added in ended)
    return Tokenized(prompt, [text for text, _ in ended], row.source_row, kind, added, scored=masks)


def _cuts(row: Rendered) -> list[str]:
    """The beginnings of texts whose ids say where scored turns lie."""
    if row.scored is None:
        return []
    pairs = zip(row.texts, row.scored, strict=True)
    return [text[:cut] for text, spans in pairs for span in spans for cut in span if cut < len(text)]


def _masks(
    row: Rendered, ids: Mapping[str, list[int]], completions: list[list[int]], encoder: Encoder
) -> list[list[bool]] | None:
    """Which tokens of each completion lie in a scored turn; what a template writes after an end of turn does not."""
    if row.scored is None:
        return None
    masks = []
    for text, spans, completion in zip(row.texts, row.scored, completions, strict=True):
        whole = ids[text]
        # Places are counted from the end, so that they hold for a completion that was tokenised on its own, too.
        mask = [False] * max(len(whole), len(completion))
        for start, end in spans:
            first, stop = (len(whole) if cut == len(text) else _common(ids[text[:cut]], whole) for cut in (start, end))
            shift = len(mask) - len(whole)
            mask[first + shift : stop + shift] = [True] * max(stop - first, 0)
        masks.append(mask[len(mask) - len(completion) :])
    return masks


def _alone(row: Rendered, completion: str, encoder: Encoder) -> str:
    return completion if row.templated else encoder.without_end(completion)


def _common(ids: list[int], other: list[int]) -> int:
    """How many leading ids two lists share."""
    if other[: len(ids)] == ids:
        return len(ids)
    return next(i for i, (a, b) in enumerate(zip([*ids, -1], [*other, -2], strict=False)) if a != b)


def _boundary_message(row: Rendered, prompt: list[int], shared: int, encoder: Encoder) -> str:
    end = encoder.tokenizer.decode(prompt[shared:])
    cause = (
        "tokens merge across the boundary; end the prompt where a token ends (move a trailing space to the completions)"
        if not row.moved
        else "the template writes the prompt alone differently than in a conversation; set a template that does not"
    )
    return (
        f"{encoder.name}: row {row.source_row + 1}: the tokens of the prompt are not a prefix of the tokens of prompt "
        f"and completion, from {end!r} on: {cause}; or allow it with boundary `split` or `drop`."
    )
