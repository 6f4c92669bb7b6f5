"""Draws that are functions of a key and a place: the same completion on every machine, in every batch."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.data import answer_end, text_tokenizer
from tether.rollout.records import Sampling


class Drawn(NamedTuple):
    """Tokens of A completions.

    Args:
        ids: int64 `[A]`.
        logps: float32 `[A]` nats, with the penalty and before any cut.
        kept: float32 `[A]`, the probability that the cut left; None where nothing was cut.
    """

    ids: Tensor
    logps: Tensor
    kept: Tensor | None


def uniform(key: bytes, place: int) -> float:
    """A number from 0 to below 1 for a place in a completion.

    >>> uniform(b"a", 0) == uniform(b"a", 0), uniform(b"a", 0) == uniform(b"a", 1)
    (True, False)
    """
    digest = blake2b(place.to_bytes(4, "little"), key=key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def seen_tokens(prompts: Sequence[Tensor], vocabulary: int, device: torch.device) -> Tensor:
    """Bool `[A, vocabulary]`: the tokens of each prompt `[P]`.

    >>> seen_tokens([torch.tensor([1, 1]), torch.tensor([0])], 3, torch.device("cpu")).tolist()
    [[False, True, False], [True, False, False]]
    """
    seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[prompt.to(device)] = True
    return seen


def stop_ids(generation: Any, processing: Any, *, chat: bool) -> tuple[int, ...]:
    """Every token that ends a completion: those of the model's generation settings and of its tokenizer, and the one
    that the chat template ends an answer with, which is another where a base model was given a template.

    Args:
        generation: the model's `generation_config`; None: it has none.
        processing: its tokenizer or processor.
        chat: prompts are messages.
    """
    listed = getattr(generation, "eos_token_id", None)
    ends = [*(listed if isinstance(listed, (list, tuple)) else [listed]), text_tokenizer(processing).eos_token_id]
    return tuple(sorted({int(one) for one in (*ends, answer_end(processing) if chat else None) if one is not None}))


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of which those of seen tokens are divided by the penalty, or multiplied where they are negative.

    Reference:
        Keskar et al., CTRL, section 4.1, arXiv:1909.05858; the same number with logits divided by a temperature.

    Example:
        >>> penalised(torch.tensor([[2.0, -2.0, 2.0]]), torch.tensor([[True, True, False]]), 2.0)
        tensor([[ 1., -4.,  2.]])
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def draw(logits: Tensor, keys: Sequence[bytes], place: int, sampling: Sampling, seen: Tensor | None = None) -> Drawn:
    """The next token of each completion: the first whose cumulative probability exceeds its uniform number.

    Args:
        logits: float32 `[A, vocabulary]`, divided by the temperature.
        keys: A keys, see `RolloutRequest.key`.
        place: of the token in its completion.
        sampling: what is cut.
        seen: bool `[A, vocabulary]`, tokens that the penalty is of; what is drawn is added. None: there is no penalty.
    """
    if seen is not None:
        logits = penalised(logits, seen, sampling.repetition_penalty)
    logps = logits.log_softmax(-1)
    probs = logps.double().exp()
    kept = None
    if sampling.cuts:
        whole = probs.sum(-1)
        if sampling.never:
            probs[:, list(sampling.never)] = 0.0
        probs = probs.masked_fill(~allowed(probs, sampling), 0.0)
        kept = (probs.sum(-1) / whole).float()
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1]
    numbers = torch.tensor([uniform(key, place) for key in keys], dtype=torch.float64, device=logits.device)
    wanted = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    ids = torch.searchsorted(cumulative, wanted[:, None], right=True)[:, 0]
    if seen is not None:
        seen.scatter_(1, ids[:, None], True)
    return Drawn(ids, logps.gather(-1, ids[:, None])[:, 0], kept)


def allowed(probs: Tensor, sampling: Sampling) -> Tensor:
    """Bool `[A, vocabulary]`: what may be drawn, the most likely token always.

    Args:
        probs: `[A, vocabulary]`.
        sampling: `top_k`, then `top_p` of what it left, then `min_p`.

    Example:
        >>> probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
        >>> allowed(probs, Sampling(1.0, 8, (), top_p=0.7)).tolist()
        [[True, True, False, False]]
    """
    ordered, places = probs.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_k:
        keep[:, sampling.top_k :] = False
    if sampling.top_p < 1:
        left = ordered * keep
        before = (left.cumsum(-1) - left) / left.sum(-1, keepdim=True)
        keep &= before < sampling.top_p
    if sampling.min_p:
        keep &= ordered >= sampling.min_p * ordered[:, :1]
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter(-1, places, keep)
