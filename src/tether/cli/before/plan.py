"""`tether plan run.yaml`: what a run will take, before any weights are read; and what to set where it does not fit."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tether.cli.foreign.convert import As
from tether.cli.run import AnyRunFile, AsJson, Debug
from tether.errors import ConfigError, TetherError

if TYPE_CHECKING:
    from tether.config import RunConfig
    from tether.plan import Machine, Plan

_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "": 2**30}
# From what changes nothing but time to what changes what is learnt.
_CHANGES: tuple[dict[str, Any], ...] = (
    {"train.max_tokens_per_forward": 1024},
    {"train.gradient_checkpointing": True},
    {"model.dtype": "bfloat16"},
    {"lora": {"r": 16}},
    {"model.quantization": "4bit"},
    {"train.max_length": 512},
)
_PROBE_STEPS = 4


def plan(
    run_file: AnyRunFile,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys to set, as in train.max_length=512.", metavar="KEY=VALUE")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Memory of a GPU to plan for, as in 80GiB; left out: this machine.", metavar="SIZE"),
    ] = None,
    gpus: Annotated[int, typer.Option(help="How many of them.", min=1, metavar="NUMBER")] = 1,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Weights, gradients and optimizer are cut over them.")] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Load the model and measure the time of a few steps on this machine.")
    ] = False,
    as_json: AsJson = False,
    command: As = None,
    debug: Debug = False,
) -> None:
    """Say what a run will take.

    Raises:
        TetherError: bad input; nothing was loaded but configuration, tokenizer and rows.
        typer.Exit: code 1 when it would not fit.
    """
    from tether.config.keys.unknown import refuse_at_once

    refuse_at_once(run_file, overrides or ())
    from tether.cli.output import terminal_output
    from tether.config import load_run_file
    from tether.config.foreign import convert_file, is_foreign

    if (gpus > 1 or fsdp) and gpu is None:
        raise ConfigError("--gpus and --fsdp are of GPUs that --gpu describes. Give --gpu with their memory, as 80GiB.")
    if fsdp and gpus == 1:
        raise ConfigError("--fsdp cuts weights over several GPUs, and --gpus is 1. Raise it, or leave --fsdp out.")
    if probe and gpu is not None:
        raise ConfigError("--probe measures this machine, and --gpu names another. Leave one of them out.")
    if command or is_foreign(run_file):
        run = convert_file(run_file, overrides or (), command).run
    else:
        run = load_run_file(run_file, overrides or ())
    with terminal_output(debug):
        place = _machine(gpu, gpus, fsdp)
        found = planned(run, place)
        change = None if found.fits else mend(run, place)
        seconds = _probe(run) if probe else None
    shown = {**found.to_dict(), "change": change and change[0], "seconds_per_step": seconds}
    lines = [json.dumps(shown)] if as_json else _lines(found, change, seconds)
    for line in lines:
        typer.echo(line)
    if not found.fits:
        raise typer.Exit(1)


def planned(run: RunConfig, place: Machine, *, whole: bool = True) -> Plan:
    """The plan of a checked run file on a machine; `whole` as of `tether.plan.plan_run`."""
    from tether.config import build
    from tether.plan import plan_run

    args, adapter, keywords = build(run)
    rows = keywords["train_dataset"], keywords["eval_dataset"]
    return plan_run(run.model.name, args, adapter, rows, keywords.get("ref_model"), place, whole=whole)


def mend(run: RunConfig, place: Machine) -> tuple[dict[str, Any], Plan] | None:
    """The cheapest change with which a run fits, one key or the first few together; None where none is enough."""
    together: dict[str, Any] = {}
    tried: list[dict[str, Any]] = list(_CHANGES)
    for change in _CHANGES:
        together = {**together, **change}
        tried.append(together)
    for change in tried:
        found = _changed(run, change, place)
        if found is not None and found.fits:
            return change, found
    return None


def _changed(run: RunConfig, changes: dict[str, Any], place: Machine) -> Plan | None:
    """The plan of a changed run; None where the run takes no such change."""
    from tether.config import check_run

    values = run.model_dump(mode="json", exclude_unset=True)
    for name, value in changes.items():
        section, _, key = name.partition(".")
        if key:
            values[section] = {**values.get(section, {}), key: value}
        elif run.lora is None and run.peft is None:
            values[section] = value
    try:
        return planned(check_run(values), place, whole=False)
    except TetherError:
        return None  # such as a quantisation without an adapter


def _machine(gpu: str | None, gpus: int, fsdp: bool) -> Machine:
    from tether.plan import Machine

    return Machine.here() if gpu is None else Machine(size_of(gpu), True, gpus, fsdp)


def size_of(text: str) -> int:
    """Bytes of a size such as `80GiB`.

    >>> size_of("1.5GiB"), size_of("24 GB")
    (1610612736, 24000000000)

    Raises:
        ConfigError: it is not a size.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]i?B)?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"--gpu is {text!r}; allowed is a size above 0, such as 80GiB or 24GB.")
    return int(float(found[1]) * _UNITS[(found[2] or "").upper()])


def _probe(run: RunConfig) -> float:
    """Seconds of a step, measured: the run's own first steps in a folder that is thrown away."""
    from transformers import TrainerCallback

    from tether.config import build, trainer_class

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            ends.append(time.monotonic())

    args, adapter, keywords = build(run)
    args.max_steps, args.save_strategy, args.eval_strategy, args.report_to = _PROBE_STEPS, "no", "no", []  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        trainer = trainer_class(run.objective.loss)(args=args, peft_config=adapter, callbacks=[Clock()], **keywords)
        trainer.train()
    # The first step makes the optimizer and proves the layout once more.
    return (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else float("nan")


def _lines(found: Plan, change: tuple[dict[str, Any], Plan] | None, seconds: float | None) -> Sequence[str]:
    model, rows, batch = found.model, found.rows, found.batch
    share = 1 - rows["tokens"] / rows["tokens_unshared"]
    parts = ", ".join(f"{name} {_mib(size)}" for name, size in found.memory.items() if size)
    lines = [
        f"model: {model['class']}, {model['parameters']:,} parameters, {model['trainable']:,} train",
        f"reference: {found.reference['meaning']}, by {found.reference['method']}: {found.reference['why']}",
        f"rows: {rows['rows']:,}; tokens per epoch {rows['tokens']:,} with prompts shared, "
        f"{rows['tokens_unshared']:,} without ({share:.0%} saved)",
        f"steps: {found.steps:,}, each of {batch['rows_per_step']:,} rows; at most {batch['tokens_per_forward']:,} "
        "tokens a forward",
        f"memory: {parts}",
        f"peak: {_mib(found.peak)} of {_mib(found.machine.memory)} ({found.machine.words})",
    ]
    if seconds is not None:
        lines.append(f"time: {seconds:.2f} s a step measured here, {seconds * found.steps / 60:,.0f} min for all steps")
    lines += [f"note: {note}" for note in found.notes]
    if found.fits:
        return [*lines, "it fits"]
    if change is None:
        return [*lines, "it does not fit, and no change that is known here is enough. Take a smaller model."]
    keys = " ".join(f"{name}={json.dumps(value)}" for name, value in change[0].items())
    return [*lines, f"it does not fit. With {keys} the peak is {_mib(change[1].peak)}, which fits."]


def _mib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
