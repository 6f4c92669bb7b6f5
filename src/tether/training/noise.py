"""NEFTune's noise on the embeddings, of each sequence by itself: the same however a step is split into rows.

transformers' own hook takes a row for a sequence: with packed rows, or with padding, the noise of a sequence would
depend on what stands beside it.
"""

from __future__ import annotations

import logging
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tether.errors import ConfigError
from tether.models.structure import transformers_model
from tether.scoring.score import Layout, row_lengths
from tether.training.config import PreferenceConfig

logger = logging.getLogger("tether")


def layout_for_noise(args: PreferenceConfig, policy: nn.Module) -> Layout | None:
    """The layout that noise needs: a row for each sequence. None without noise.

    Raises:
        ConfigError: another layout was asked for, or the model has an encoder and a decoder.
    """
    if args.neftune_noise_alpha is None:
        return None
    if transformers_model(policy).config.is_encoder_decoder:
        raise ConfigError(
            f"is {args.neftune_noise_alpha}, and a model with an encoder and a decoder embeds a prompt once for "
            "several completions, so that noise would not be a sequence's own. Leave it out.",
            "neftune_noise_alpha",
        )
    if args.scoring_layout == "tree" or args.attention_backend != "auto":
        raise ConfigError(
            f"is {args.neftune_noise_alpha} and a packed row was asked for, in which completions share the embeddings "
            "of their prompt, so that noise would not be a sequence's own. Leave scoring_layout and attention_backend "
            "out.",
            "neftune_noise_alpha",
        )
    logger.info("noise: NEFTune's, drawn for each sequence from its tokens, seed and step, so that rows are padded")
    return "padded"


def sequence_noise(ids: Tensor, lengths: tuple[int, ...], width: int, alpha: float, key: bytes) -> Tensor:
    """Uniform in `[-m, m]` with `m = alpha / sqrt(tokens * width)`, for each row by itself; padding gets none.

    Args:
        ids: `[rows, columns]`.
        lengths: of the rows, without padding on their right.
        width: of an embedding.
        alpha: NEFTune's.
        key: what the noise of one sequence is told apart by at different times.

    Returns:
        `[rows, columns, width]`, float32.

    Reference:
        Jain et al., NEFTune, equation 1, arXiv:2310.05914.
    """
    noise = torch.zeros(*ids.shape, width, device=ids.device)
    for row, (own, length) in enumerate(zip(ids.cpu(), lengths, strict=True)):
        digest = blake2b(key + own[:length].numpy().tobytes(), digest_size=7).digest()
        dice = torch.Generator(ids.device).manual_seed(int.from_bytes(digest, "little"))
        drawn = torch.rand(length, width, generator=dice, device=ids.device)
        noise[row, :length] = (2.0 * drawn - 1.0) * (alpha / (length * width) ** 0.5)
    return noise


class SequenceNoise(TrainerCallback):
    """Puts the noise on the policy's embeddings while it trains, in training mode only.

    Args:
        trainer: whose own hook is taken out of use.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._alpha, trainer.neftune_noise_alpha = float(trainer.neftune_noise_alpha or 0.0), None
        self._handle: Any = None
        self._seed, self._step = trainer.args.seed, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Hook the embeddings."""
        self.remove()
        embeddings: Any = transformers_model(kwargs["model"]).get_input_embeddings()
        self._handle = embeddings.register_forward_hook(self._add)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """The noise is another in each step."""
        self._step = state.global_step

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Leave the model as it was."""
        self.remove()

    def remove(self) -> None:
        """Take the hook away."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        ids = inputs[0]
        lengths = row_lengths.get() or (ids.shape[1],) * ids.shape[0]
        noise = sequence_noise(ids, lengths, output.shape[-1], self._alpha, f"{self._seed}:{self._step}:".encode())
        return output + noise.to(output.dtype)
