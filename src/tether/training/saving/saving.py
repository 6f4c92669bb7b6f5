"""What a trainer does around every save: averaged weights, finite ones, and at the end the proof by loading."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from tether.compat.trainer import use_averages
from tether.progress import working
from tether.reference.base import Scorer
from tether.reference.methods.shards import is_sharded
from tether.scoring import tolerance
from tether.scoring.attention.interface import HALF
from tether.training.config import PreferenceConfig
from tether.training.saving.finite import FiniteGuard
from tether.training.saving.reload import ReloadProof
from tether.training.setup.run import Run

logger = logging.getLogger("tether")


class Saving:
    """Stands around a trainer's saves.

    Args:
        run: what is trained.
        args: of the run.
        accelerator: of the run.
        processing: its tokenizer or processor.
    """

    def __init__(self, run: Run, args: PreferenceConfig, accelerator: Accelerator, processing: Any) -> None:
        self._run, self._args, self._accelerator, self._processing = run, args, accelerator, processing
        self.finite = FiniteGuard(accelerator, str(args.output_dir))

    def begin(self, policy: nn.Module, optimizer: Any, otherwise: str) -> None:
        """Bring the weights into the state that is saved, or stop where they are not finite.

        Args:
            policy: in training.
            optimizer: of the run; None before there is one.
            otherwise: what is not done with weights that are not finite, for the message.
        """
        use_averages(optimizer)
        self.finite.check_weights(policy, otherwise)

    def prove(self, policy: nn.Module, folder: Path, *, shards: bool) -> None:
        """Compare what is loaded from a folder with the policy; `shards`: what was saved is in a form of its own."""
        if self._accelerator.is_main_process:
            reason = "its weights are in shards" if shards or is_sharded(policy) else ""
            with working("comparing what was saved with the model in memory"):
                found = self._compared(policy, folder, self._run.scorer, self._accelerator.autocast, reason)
            logger.info(f"saved: {folder}: {found}")

    def prove_start(self, policy: nn.Module, folder: Path) -> None:
        """The same for a rehearsal, of a policy whose base was rewritten by its adapter.

        Autocast would hide small mistakes: what is saved is another sum of the same, which it rounds otherwise.
        """
        precision = self._accelerator.autocast if self._args.attention_backend in HALF else nullcontext
        found = self._compared(policy, folder, self._run.exact, precision)
        logger.info(f"saving: the adapter rewrote its base; rehearsed: {found}")

    def _compared(
        self,
        policy: nn.Module,
        folder: Path,
        scorer: Scorer,
        precision: Callable[[], AbstractContextManager[Any]],
        reason: str = "",
    ) -> str:
        with precision():
            rounding = tolerance(policy)
        proof = ReloadProof(self._args, self._load, scorer, self._run.probe, rounding)
        return proof.check(policy, folder, reason)

    def _load(self, source: str, **options: Any) -> nn.Module:
        model = self._run.algorithm.load_saved(source, **options)
        self._run.algorithm.prepare_model(model, self._processing)
        return model
