"""Around transformers' own saving of a model: what it would leave out is written, and what is written is checked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import TrainingArguments

from tether.compat.messages import EMBEDDINGS_SAVED
from tether.errors import TetherError
from tether.models.adapters import write_active
from tether.models.adapting.adapter_files import write_sums
from tether.models.adapting.base_rewriting import write_plain
from tether.models.adapting.extra_tensors import shared_by_hand, write_beside
from tether.models.structure import require_adapter, trainable_tensors, unwrap
from tether.redact import masked_values
from tether.training.saving.model_settings import OwnSettings, generation_as_it_is


@contextmanager
def whole_save(
    model: nn.Module,
    folder: str | Path,
    args: TrainingArguments,
    settings: OwnSettings,
    state: dict[str, Tensor] | None,
) -> Iterator[dict[str, Tensor] | None]:
    """Inside, transformers saves a model; afterwards every trained tensor is in a file that loading reads.

    Args:
        model: the one in training.
        folder: that it is saved in.
        args: of the run; they say which process writes.
        settings: the model's own, which are saved in place of the run's.
        state: whole tensors by name, where the model's own are shards; empty: none are written.

    Yields:
        The tensors to save, or None for the model's own.

    Raises:
        TetherError: a trained tensor is in no file; or the adapter was taken off, before anything is written.
    """
    folder = Path(folder)
    require_adapter(model)
    with warnings.catch_warnings(), settings.in_place(), generation_as_it_is(model, folder, write=args.should_save):
        # PEFT says that it saves the embeddings of new tokens, which is what is wanted.
        warnings.filterwarnings("ignore", EMBEDDINGS_SAVED)
        # transformers writes its arguments beside the model.
        with without_secrets(args):
            yield _with_shared(model, state)
    if not args.should_save:
        return
    write_active(model, folder)
    if isinstance(inner := unwrap(model), PeftModel):
        write_beside(model, folder, state)
        write_plain(model, folder)
        write_sums(inner, folder)
    elif state != {}:
        require_written(model, folder)


@contextmanager
def without_secrets(args: TrainingArguments) -> Iterator[None]:
    """Inside, arguments have no login to the hub, and no name, password or key in addresses."""
    given = vars(args).copy()
    vars(args).update(masked_values(given))
    try:
        yield
    finally:
        vars(args).update(given)


def _with_shared(model: nn.Module, state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """The tensors of a model that has some shared by hand, each of these once more under the name that loading asks."""
    inner = unwrap(model)
    if isinstance(inner, PeftModel) or state == {}:
        return state
    shared = shared_by_hand(inner)
    if not shared:
        return state
    whole = inner.state_dict() if state is None else dict(state)
    return {**whole, **{name: whole[name].clone() for name in shared if name in whole}}


def require_written(model: nn.Module, folder: Path) -> None:
    """Refuse a folder that lacks a trained tensor of a model without adapters.

    transformers writes some architectures under the names of their first release (experts, vision towers); there the
    numbers in the files are counted.

    Raises:
        TetherError: with the names.
    """
    written = dict(_written(folder))
    inner, trained = unwrap(model), trainable_tensors(model)
    aliases: dict[int, list[str]] = {}
    for name, tensor in inner.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(tensor), []).append(name)
    if not written.keys() <= inner.state_dict().keys():
        lost = _uncounted(trained, written)
    else:
        lost = [name for name, tensor in trained.items() if not written.keys() & set(aliases[id(tensor)])]
        lost += [name for name in shared_by_hand(inner) if name not in written]
    if lost:
        raise TetherError(
            f"{len(lost)} trained tensors, such as {lost[0]!r}, are in no file of {folder}, so that the model would be "
            "loaded without what it learnt. The model in memory is whole: save it with its own save_pretrained, and "
            "report this as a bug in Tether."
        )


def _uncounted(trained: Mapping[str, Tensor], written: Mapping[str, int]) -> list[str]:
    wanted = sum(tensor.numel() for tensor in trained.values())
    return list(trained)[:1] if sum(written.values()) < wanted else []


def _written(folder: Path) -> Iterator[tuple[str, int]]:
    """Name and size of each tensor in a model's files; only their heads are read."""
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                yield name, size
