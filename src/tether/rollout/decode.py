"""Attention while branches grow: each trunk's keys once, one token of each unfinished branch a step, no padding of
branches, as all that are unfinished have the same length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tether.scoring.attention.interface import tree_attention
from tether.types import Forest

_STEP = 32


@dataclass
class _Layer:
    """Keys and values of one attention module.

    Args:
        trunks: two of `[trees, heads, longest trunk, head_dim]`.
        own: two of `[rows, heads, places, head_dim]`; None before the first token.
        version: rows that were let go so far.
    """

    trunks: tuple[Tensor, Tensor]
    own: tuple[Tensor, Tensor] | None = None
    version: int = 0


class Decoding:
    """What the branches of some prompts have computed so far.

    Args:
        trunks: tokens of each prompt.
        branches: of each prompt; rows are numbered prompt by prompt.
        device: of the model.
    """

    def __init__(self, trunks: list[int], branches: list[int], device: torch.device) -> None:
        self._lengths = torch.tensor(trunks, device=device)
        self._trees = torch.repeat_interleave(torch.arange(len(trunks)), torch.tensor(branches)).to(device)
        self._layers: dict[nn.Module, _Layer] = {}
        self._gone: list[Tensor] = []
        self._place = -1
        self._widest = max(trunks)
        # Of the present rows and place, the same for all layers.
        self._spots: tuple[Tensor, int] | None = None
        self._seen: dict[int | None, Tensor] = {}

    @property
    def positions(self) -> Tensor:
        """int64 `[rows]`, of the tokens that are computed next."""
        return self._lengths[self._trees] + self._place + 1

    def begin(self) -> None:
        """A token of each row is computed next."""
        self._place += 1
        self._seen.clear()

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on.

        Args:
            rows: int64, ascending numbers of the present ones.
        """
        self._trees = self._trees[rows]
        self._gone.append(rows)
        self._spots = None
        self._seen.clear()

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, forest: Forest | None, **options: Any
    ) -> Tensor:
        """See `tree_attention`; with a forest the prompts, and without one a token of each row."""
        # Under autocast rotary embeddings leave queries and keys wider than values.
        narrow = key.to(value.dtype)
        if forest is not None:
            self._layers[module] = _Layer((self._padded(narrow, forest), self._padded(value, forest)))
            return tree_attention(module, query, key, value, forest, **options)
        return self._decode(self._layers[module], query.to(value.dtype), narrow, value, **options)

    def _padded(self, states: Tensor, forest: Forest) -> Tensor:
        """`[1, heads, T, head_dim]` of all prompts, tree by tree."""
        found = states.new_zeros(len(forest.trees), states.shape[1], self._widest, states.shape[3])
        for number, tree in enumerate(forest.trees):
            found[number, :, : tree.end - tree.start] = states[0, :, tree.start : tree.end]
        return found

    def _decode(
        self,
        layer: _Layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        keys, values = self._own(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
        rows, groups = query.shape[2], query.shape[1] // key.shape[1]
        asked = query[0].transpose(0, 1).unflatten(1, (-1, groups))  # [rows, kv heads, groups, head_dim]
        asked = asked * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        width = self._by_tree(asked.device)[1]
        # One product for all branches of a trunk: [trees, kv heads, branches * groups, trunk].
        flat = self._together(asked).transpose(1, 2).flatten(2, 3)
        trunk = (flat @ layer.trunks[0].transpose(2, 3)).unflatten(2, (width, groups)).transpose(1, 2)
        scores = torch.cat([self._apart(trunk), asked @ keys.transpose(2, 3)], -1).float()
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~self._visible(keys.shape[2], sliding_window)[:, None, None], -torch.inf)
        if s_aux is not None:
            sinks = s_aux.float().view(1, -1, groups, 1).expand(rows, -1, -1, 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        weights = weights.to(value.dtype)
        spread = self._together(weights[..., : self._widest]).transpose(1, 2).flatten(2, 3)
        mixed = (spread @ layer.trunks[1]).unflatten(2, (width, groups)).transpose(1, 2)
        found = self._apart(mixed) + weights[..., self._widest :] @ values
        return found.flatten(1, 2)[None]

    def _together(self, rows: Tensor) -> Tensor:
        """`[trees, width, …]` of `[rows, …]`, zeros where a tree has fewer rows than another."""
        places, width = self._by_tree(rows.device)
        if len(rows) == len(self._lengths) * width:
            return rows.unflatten(0, (len(self._lengths), width))
        found = rows.new_zeros(len(self._lengths), width, *rows.shape[1:])
        found[self._trees, places] = rows
        return found

    def _apart(self, found: Tensor) -> Tensor:
        """The reverse of `_together`."""
        places, width = self._by_tree(found.device)
        even = len(self._trees) == len(self._lengths) * width
        return found.flatten(0, 1) if even else found[self._trees, places]

    def _own(self, layer: _Layer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows' own tokens, `[rows, heads, places, head_dim]`, the newest included."""
        held = layer.own
        for rows in self._gone[layer.version :]:
            held = None if held is None else (held[0][rows], held[1][rows])
        layer.version = len(self._gone)
        if held is None or held[0].shape[2] <= self._place:
            more = key.new_zeros(*key.shape[:2], _STEP, key.shape[2])
            held = (
                (more, more.clone()) if held is None else (torch.cat([held[0], more], 2), torch.cat([held[1], more], 2))
            )
        held[0][:, :, self._place], held[1][:, :, self._place] = key, value
        layer.own = held
        return held[0][:, :, : self._place + 1], held[1][:, :, : self._place + 1]

    def _by_tree(self, device: torch.device) -> tuple[Tensor, int]:
        """The place of each row among those of its tree, and the most that a tree has."""
        if self._spots is None:
            counts = torch.bincount(self._trees, minlength=len(self._lengths))
            places = torch.arange(len(self._trees), device=device) - (counts.cumsum(0) - counts)[self._trees]
            self._spots = places, int(counts.max())
        return self._spots

    def _visible(self, own: int, window: int | None) -> Tensor:
        """Bool `[rows, trunk + own]`: what the newest token of each row sees."""
        if window in self._seen:
            return self._seen[window]
        device, lengths = self._trees.device, self._lengths[self._trees][:, None]
        trunk, mine = torch.arange(self._widest, device=device), torch.arange(own, device=device)
        seen = torch.cat([trunk < lengths, torch.ones(len(lengths), own, dtype=torch.bool, device=device)], 1)
        if window:
            place = torch.cat([trunk.expand(len(lengths), -1), lengths + mine], 1)
            seen &= lengths + own - 1 - place < window
        self._seen[window] = seen
        return seen
