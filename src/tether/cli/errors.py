"""What a command says when it fails: one paragraph and an exit code, whatever went wrong."""

from __future__ import annotations

import errno
import sysconfig
import traceback
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import typer

from tether.errors import TetherError
from tether.files import is_full
from tether.redact import masked

# The parent of typer's public BadParameter: every misuse of commands and options. Typer does not export it.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
INTERRUPTED = 130


# What the system says of a name that was given, and not of the run.
_GIVEN_WRONG = (errno.ENOENT, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
_TRACEBACK = "With --debug there is a traceback."
_NOT_INSTALLED = ("to be installed", "is not installed", "Please install", "need to install")
# What libraries say of a machine that lacks what was asked for, and what to do.
_MACHINE = {
    "Found no NVIDIA driver": "Set `model.device` to cpu, or leave it out; this machine has no GPU that torch can use.",
    "Torch not compiled with CUDA": "Set `model.device` to cpu, or leave it out, or install torch with CUDA.",
    "CUDA is not available": "Set `model.device` to cpu, or leave it out; this machine has no GPU that torch can use.",
    "No CUDA GPUs are available": "Set `model.device` to cpu, or leave it out; torch sees no GPU.",
    "invalid device ordinal": "Name a device that this machine has in `model.device`.",
}


class Interrupted(TetherError):
    """The user stopped the run; the message says how it goes on."""

    exit_code = INTERRUPTED


def explain(error: BaseException) -> tuple[str, int]:
    """Say what went wrong, for the person at the terminal.

    Args:
        error: what reached the command line.

    Returns:
        One paragraph and the exit code: 2 for bad input, 1 for a failed run, 130 for an interruption.
    """
    if isinstance(error, TetherError):
        return str(error), error.exit_code
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return "Stopped.", INTERRUPTED
    if isinstance(error, UsageError):
        context = getattr(error, "ctx", None)
        command = "tether" if context is None else context.command_path
        return f"{_sentence(error.format_message())} `{command} --help` lists what there is.", 2  # type: ignore
    # torch is not imported here; its error is known by its name.
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return (
            f"The memory is full: {_first_line(error)} Lower `train.max_tokens_per_forward` (the run's first "
            "lines say what it was) or `train.max_length`, or train an adapter (`lora:`) in place of the whole model.",
            1,
        )
    if is_full(error):
        return _explain_full(error), 1
    if (worker := _killed_worker(error)) is not None:
        return worker, 1
    if isinstance(error, OSError) and error.errno is not None:
        return _explain_system(error), 2 if error.errno in _GIVEN_WRONG else 1
    package = error.name if isinstance(error, ImportError) else None
    is_own = package is not None and package.partition(".")[0] == "tether"
    missing = isinstance(error, ImportError) and not is_own
    if missing or any(words in str(error) for words in _NOT_INSTALLED):
        name = f" (package {package})" if package else ""
        return (
            f"Something that was asked for is not installed{name}: {_first_line(error)} Install it, or change the "
            "option that asks for it (a tracker in `train.report_to`, an optimizer in `train.optim`, a quantisation).",
            2,
        )
    if (place := _place(error)) is not None:
        return f"{type(error).__name__} in {place}, which is not Tether's: {_first_line(error)} {_TRACEBACK}", 1
    if type(error).__name__ == "SafetensorError":
        return f"A file of weights is damaged: {_first_line(error)} Copy or download it again. {_TRACEBACK}", 2
    if isinstance(error, RecursionError):
        return f"A file that was given nests its values deeper than can be read; correct it. {_TRACEBACK}", 2
    said = _first_line(error)
    if isinstance(error, ValueError) and "embedded null" in said:
        return "A name of a file or folder that was given has a null character, which no system allows; correct it.", 2
    for mark, advice in _MACHINE.items():
        if mark in said:
            return f"{said} {advice}", 2
    return (
        f"An error that Tether did not expect: {type(error).__name__}: {_first_line(error)} This is a bug in Tether or "
        "in a library under it. Run the same command with --debug for the traceback, and report it together with that.",
        1,
    )


def _place(error: BaseException) -> str | None:
    """Where an error comes from, if that is a function of the user's own that Tether called; None for another place."""
    paths = sysconfig.get_paths()
    libraries = [Path(paths[name]).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    own = Path(__file__).resolve().parents[1]
    for step in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(step.filename).resolve()
        if file.is_relative_to(own):
            return None
        if file.is_file() and not any(file.is_relative_to(folder) for folder in libraries):
            return f"{step.name}() ({file.name}, line {step.lineno})"
    return None


def print_error(paragraph: str) -> None:
    """Print a paragraph on standard error, in one line where there is no terminal to wrap it for."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    text = Text.assemble(("Error: ", "bold red"), " ".join(masked(paragraph).split()))
    console.print(text, soft_wrap=not console.is_terminal)


def _explain_full(error: BaseException) -> str:
    name = getattr(error, "filename", None)
    place = repr(str(name)) if name else "what was written last (a file of the run, or where its output goes)"
    return (
        f"There is no space left on the disk for {place}. Free some (old checkpoint-* "
        "folders are the largest) and go on with --resume, or write elsewhere with `output=FOLDER`; "
        "`train.save_total_limit` keeps fewer checkpoints. Whole checkpoints still are whole. Where there is space, "
        "a quota or the limit of `ulimit -f` is reached."
    )


def _killed_worker(error: BaseException) -> str | None:
    """What to say of a process that was killed beside the run; None for another error."""
    if not isinstance(error, BrokenProcessPool) and "DataLoader worker" not in str(error):
        return None
    return (
        f"A process that prepares rows beside the run has ended: {_first_line(error)} Something killed it, mostly the "
        "system for want of memory: lower `train.dataset_num_proc` and `train.dataloader_num_workers`, and go on with "
        "--resume where there are checkpoints."
    )


def _explain_system(error: OSError) -> str:
    place = f" '{error.filename}'" if error.filename else ""
    if error.errno == errno.ENOENT and "temporary directory" in str(error.strerror):
        return f"{_sentence(str(error.strerror))} Set TMPDIR to a folder that can be written."
    if error.errno == errno.ENOENT:
        return (
            f"The file{place} is missing. Where it belongs to a checkpoint, that was not written whole or was changed "
            "since: go on from an earlier one with --resume=PATH."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        what = place or " a file of the run"
        return f"No permission for{what}: {error.strerror}. Change its rights, or write elsewhere with `output=FOLDER`."
    return f"The system refused{place or ' a request'}: {error.strerror}. With --debug there is a traceback."


def _first_line(error: BaseException) -> str:
    return _sentence((str(error).strip().splitlines() or ["without a message"])[0])


def _sentence(line: str) -> str:
    return line if line.endswith((".", "!", "?")) else f"{line}."
