"""What happens beside the steps: the guards, the last evaluation, threads, the metrics file."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection
from copy import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tether.compute.precision import require_own_precision
from tether.compute.threads import ThreadsAgain
from tether.errors import ConfigError, TetherError
from tether.files import write_whole
from tether.reference import FrozenProbe
from tether.reference.guard import require_recording
from tether.training.setup.run import Run

logger = logging.getLogger("tether")
METRICS = "metrics.jsonl"
_STUCK_LOGS = 20
# Logs in a row without any gradient, after which that is said.
_FLAT_LOGS = 3
# Updates after which the layout is proved once more: the first changes an adapter's zero half alone.
_PROVED_AFTER = 2


class GuardCallback(TrainerCallback):
    """Runs the guards of `tether.reference.guard` at their moments.

    Args:
        run: has the proof that something trains; a step of its algorithm may have no gradient, and proves nothing then.
        begin: called once before the first step; checks start equality and returns the frozen probe, or None for no
            reference.
        every: steps between two checks of the frozen probe; 0 for never.
        prove_again: proves the layout once more, given how many updates there were; called once.
    """

    def __init__(
        self,
        run: Run,
        begin: Callable[[TrainerState], FrozenProbe | None],
        every: int,
        prove_again: Callable[[int], None],
    ) -> None:
        self._proof, self._still = run.proof, run.algorithm.still_steps
        self._begin, self._every, self._prove_again = begin, every, prove_again
        self._options = _own_options(run.algorithm.args)
        self._probe: FrozenProbe | None = None
        self._moving = False
        self._zero_margins = self._flat = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Options as they were, start equality, and the optimizer's tensors."""
        require_own_precision("train()")
        self._require_options(args)
        self._probe = self._begin(state)
        if kwargs.get("optimizer") is not None:
            self._proof.require_optimizer(kwargs["optimizer"])
            self._proof.require_scheduler(kwargs.get("lr_scheduler"), kwargs["optimizer"])

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Options as they were, and gradients are recorded."""
        self._require_options(args)
        require_recording(state.global_step + 1)

    def _require_options(self, args: TrainingArguments) -> None:
        changed = next((name for name, value in self._options.items() if getattr(args, name) != value), None)
        if changed is not None:
            raise ConfigError(
                f"was {self._options[changed]!r} when the trainer was made and is {getattr(args, changed)!r} now. A "
                "run has the options that its trainer was made with, and its checkpoints hold them. Set it in the "
                "configuration that the trainer is given.",
                changed,
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Remember whether this step can change anything: a warm-up starts at a learning rate of 0."""
        optimizer: torch.optim.Optimizer = kwargs["optimizer"]
        self._moving = any(group["lr"] > 0 for group in optimizer.param_groups)
        if self._moving and self._still and self._proof.pending:
            tensors = (one for group in optimizer.param_groups for one in group["params"])
            self._moving = any(one.grad is not None and bool(one.grad.any()) for one in tensors)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Something changed, what trains did not, and neither did the reference."""
        self._proof.require_same_tensors(state.global_step)
        # In float16 the gradient scaler skips steps until it has found its scale.
        skipped = getattr(kwargs.get("optimizer"), "step_was_skipped", False)
        if self._moving and not skipped:
            self._proof.updates += 1
            if self._proof.pending:
                self._proof.require_change(state.global_step)
            if self._proof.updates == _PROVED_AFTER:
                self._prove_again(self._proof.updates)
        if self._probe is not None and self._every and state.global_step % self._every == 0:
            self._probe.check(state.global_step)
        if self._probe is not None:
            self._probe.follow(state.global_step, rescore=bool(self._every))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """The reference is still where it was; a run too short for the second proof of the layout has it here."""
        if 0 < self._proof.updates < _PROVED_AFTER:
            self._prove_again(self._proof.updates)
        if self._probe is not None and self._every:
            self._probe.check(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Stop on a loss that is not a number, and on margins that stay exactly zero."""
        logs: dict[str, float] = kwargs.get("logs") or {}
        for name in ("loss", "rewards/margins", *(() if args.fp16 else ("grad_norm",))):
            if name in logs and not math.isfinite(logs[name]):
                raise TetherError(
                    f"{name} is {logs[name]} at step {state.global_step}; a loss must be a number. Lower the "
                    "learning rate, or "
                    "train in float32 or bfloat16 where float16 overflows; the weights since the last log are lost."
                )
        if "grad_norm" in logs and not self._still:
            self._flat = self._flat + 1 if logs["grad_norm"] == 0.0 else 0
            if self._flat == _FLAT_LOGS:
                logger.warning(
                    f"step {state.global_step}: the gradient was exactly 0 in {_FLAT_LOGS} logs: no row teaches "
                    "anything more, so that this run has diverged or is done (loss "
                    f"{logs.get('loss', math.nan):.4g}, margin {logs.get('rewards/margins', math.nan):.4g}). Where the "
                    "margin is in the hundreds, lower the learning rate or clip gradients (max_grad_norm), and begin "
                    "again"
                )
        if "rewards/margins" in logs:
            self._zero_margins = self._zero_margins + 1 if logs["rewards/margins"] == 0.0 else 0
            if self._zero_margins >= _STUCK_LOGS:
                raise TetherError(
                    f"The margin between chosen and rejected was exactly 0 in {_STUCK_LOGS} logs up to step "
                    f"{state.global_step}: the policy is its own reference, or nothing trains."
                )


def _own_options(args: TrainingArguments) -> dict[str, Any]:
    """Options that are not transformers' own, which reads many of its own in each step."""
    common = {one.name for one in fields(TrainingArguments)}
    return {one.name: copy(getattr(args, one.name)) for one in fields(args) if one.name not in common}


class WatchLoss(TrainerCallback):
    """Ends a run after several logged losses in a row above a threshold.

    Args:
        threshold: the loss.
        patience: how many in a row.
    """

    def __init__(self, threshold: float, patience: int) -> None:
        self._threshold, self._patience, self._above = threshold, patience, 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Count, and end the run."""
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        self._above = self._above + 1 if loss > self._threshold else 0
        if self._above >= self._patience:
            logger.warning(
                f"loss watchdog: the loss was above {self._threshold:g} in {self._above} logs up to step "
                f"{state.global_step}; the run ends here."
            )
            control.should_training_stop = True


class EvaluateLast(TrainerCallback):
    """Has the last step evaluated while the run still goes on: trackers take a later evaluation for another run."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Ask for it at the last step; an evaluation after each epoch comes by itself."""
        if state.global_step >= state.max_steps and args.eval_strategy != "epoch" and not args.load_best_model_at_end:
            control.should_evaluate = True


class ThreadsCallback(TrainerCallback):
    """Has the threads of a run on a CPU chosen anew where other processes come or go."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """What was computed before counts for nothing."""
        self._again = ThreadsAgain()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """See whether it is time."""
        self._again.look(state.global_step)


class StepLines:
    """A file of JSON objects, one a line, each with the step that it is of.

    Args:
        path: where it is; what an earlier run left there is dropped when a run begins.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._earlier = path.stat().st_size if path.is_file() else 0

    def begin(self, step: int) -> None:
        """Drop the lines of an earlier run, or, where a run resumes, keep those up to the step that it resumes from."""
        if not self._path.is_file():
            return
        written = self._path.read_bytes()
        lines = (written if step else written[self._earlier :]).decode("utf-8", "replace").splitlines()
        write_whole(self._path, "".join(line + "\n" for line in lines if _step_of(line) <= step))
        self._earlier = 0

    def has_end(self, step: int) -> bool:
        """Whether the last line of a run that ended at this step is there."""
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        return any('"total_flos"' in line and _step_of(line) == step for line in lines)

    def drop_after_end(self, step: int, names: Collection[str]) -> None:
        """Drop lines with these values that came after the end of a run, which are made again."""
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        ends = [place for place, line in enumerate(lines) if '"total_flos"' in line and _step_of(line) == step]
        after = ends[-1] + 1 if ends else len(lines)
        kept = [*lines[:after], *(line for line in lines[after:] if json.loads(line).keys() != {"step", *names})]
        if len(kept) < len(lines):
            write_whole(self._path, "".join(line + "\n" for line in kept))

    def append(self, values: dict[str, Any]) -> None:
        """Write one line."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


class MetricsFile(TrainerCallback):
    """Appends every log to `metrics.jsonl` in the run folder, one JSON object a line."""

    def __init__(self, folder: Path) -> None:
        self._file = StepLines(folder / METRICS)
        self._began = 0
        self._again: set[frozenset[str]] = set()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Drop what is not of this run."""
        self._began = state.global_step
        self._again.clear()
        if state.is_world_process_zero:
            self._file.begin(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Append one line."""
        logs: dict[str, Any] = kwargs.get("logs") or {}
        if "train_loss" in logs and self._began == state.global_step:
            # A finished run was resumed and made no step: its last line is there, or it was killed before that.
            if not state.is_world_process_zero or self._file.has_end(state.global_step):
                return
            logs = {name: logs[name] for name in ("total_flos", "epoch") if name in logs}
        elif self._began and self._began == state.global_step and frozenset(logs) not in self._again:
            # It is evaluated after its end once more, as with load_best_model_at_end.
            self._again.add(frozenset(logs))
            if state.is_world_process_zero:
                self._file.drop_after_end(state.global_step, logs)
        if state.is_world_process_zero and logs:
            self._file.append({"step": state.global_step, **logs})


def _step_of(line: str) -> float:
    """The step of a logged line; infinite for one that a killed run left unfinished."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
