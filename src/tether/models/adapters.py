"""Adapters that are read from a folder: continued, or frozen beneath a new one.

PEFT writes the adapter called `default` into a folder and every other one into a folder of its name in it, and none of
that says which of them were active. `write_active` adds it, where there were several.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from filecmp import cmp
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from tether.compat.messages import ADAPTER_INCOMPLETE
from tether.compat.peft import adopted, injected_configs, set_active, tuner_layers
from tether.errors import ConfigError
from tether.models.adapting.adapter_files import adapter_config, put_on
from tether.models.adapting.base_rewriting import named_initialisation, remember_initial
from tether.models.adapting.extra_tensors import WEIGHTS, remember_brought
from tether.models.fingerprint import base_tensors, digest_of, fingerprint
from tether.models.structure import unwrap

logger = logging.getLogger("tether")
ACTIVE = "active_adapters.json"
TRAINED = "default"
_FROZEN = "frozen"
# Folder of an adapter, or of several, each on the model with those before it.
Folders = str | Path | Sequence[str | Path]
MERGE = "tether merge ADAPTER --output FOLDER, for a further one with --base FOLDER"
# Initialisations that write into the base weights, see `rewrites_base`; measured in tests/models/test_adapter_ways.py.
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def continue_adapter(base: PreTrainedModel, folder: Folders) -> PeftModel:
    """A base with the adapter of a folder, which goes on training.

    Args:
        base: the model that it was made on.
        folder: where it was saved; with further adapters that were active, they are so again, and frozen. Of several
            folders the last adapter trains, and those before it are frozen beneath it.

    Returns:
        The model with the adapter, called `default`, in evaluation mode.

    Raises:
        ConfigError: it does not fit the base, or cannot be continued.
    """
    *under, folder = adapter_folders(folder)
    config, beneath = adapter_config(folder), {name: folder / name for name in _beneath(folder)}
    if under:
        places = [*_places(under), *beneath.values()]
        _require_sum([*places, folder])
        beneath = dict(zip(_frozen_names(places), places, strict=True))
    if config.is_prompt_learning:
        return _continue_virtual_tokens(base, folder, config)
    policy = _load(base, folder, TRAINED, trainable=True)
    _put_beneath(policy, beneath)
    remember_brought(policy, folder, TRAINED)
    if beneath:
        _activate(policy, list(beneath))
    return policy.eval()


def in_one_way(model: nn.Module) -> nn.Module:
    """The model as PEFT itself would have it, where transformers put its adapters in (`add_adapter`, or
    `from_pretrained` of an adapter's folder); any other as it is.

    Saving, loading and several adapters go one way then. No tensor changes, and nothing begins or ceases to train.

    Raises:
        ConfigError: the adapters are of several kinds, or PEFT would change them.
    """
    inner = unwrap(model)
    configs = injected_configs(inner)
    if isinstance(inner, PeftModel) or not configs:
        return model
    kinds = {kind_of(config) for config in configs.values()}
    advice = "Load it with peft's PeftModel.from_pretrained(base, folder, is_trainable=True), or give its folder."
    if len(kinds) > 1:
        raise ConfigError(
            f"The model has adapters of {len(kinds)} kinds ({', '.join(sorted(kinds))}), of which PEFT can save and "
            f"load one. {advice}"
        )
    before = {id(parameter): digest_of(parameter) for parameter in inner.parameters()}
    policy = adopted(inner)
    if {id(parameter): digest_of(parameter) for parameter in policy.parameters()} != before:
        raise ConfigError(
            f"PEFT changes tensors of the {kinds.pop()} adapter that transformers put into {type(inner).__name__}. "
            f"{advice}"
        )
    logger.info(f"adapter: {', '.join(map(repr, configs))}, which transformers put into the model")
    return policy


def taken_out(model: nn.Module) -> nn.Module:
    """The model with adapters that were merged into their base (`merge_adapter`) beside it again: merged, they would
    not train, while what is switched off and on would."""
    merged = [layer for _, layer in tuner_layers(model) if getattr(layer, "merged", False)]
    for layer in merged:
        layer.unmerge()
    if merged:
        logger.info(f"adapter: was merged into its base in {len(merged)} layers, and is beside it again")
    return model


def refuse_nameless_layers(model: nn.Module) -> None:
    """Refuse a policy with layers of an adapter of which nothing says what it is, as it could never be loaded again.

    Raises:
        ConfigError: with the way to have an adapter that can be saved.
    """
    inner = unwrap(model)
    layer = next((path for path, _ in tuner_layers(inner)), None)
    if layer is not None and not isinstance(inner, PeftModel):
        raise ConfigError(
            f"{type(inner).__name__} has layers of an adapter, such as {layer}, and no configuration of one, so that "
            "nothing could load what is saved. peft.get_peft_model, and an earlier trainer with `peft_config`, put "
            "such layers into the model that they are given, and peft.inject_adapter_in_model leaves no more. Give the "
            "PeftModel (of the earlier trainer: `trainer.policy`), or load the model anew and give `peft_config`."
        )


def new_adapter(base: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """A base with a new adapter, see `peft.get_peft_model`.

    Raises:
        ConfigError: PEFT cannot put it there, for instance as no module has a name that it asks for.
    """
    named = named_initialisation(config)
    before = fingerprint(base_tensors(base)) if named else ""
    try:
        policy = cast(PeftModel, get_peft_model(base, config))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"PEFT cannot put this adapter on {type(base).__name__}: {' '.join(str(error).split())}"
        ) from error
    if named and fingerprint(base_tensors(policy)) != before:
        remember_initial(policy)
    return policy


def stack_adapter(base: PreTrainedModel, folder: Folders, config: PeftConfig) -> PeftModel:
    """A base with the adapter of a folder, frozen, and a new one over it that trains; both are in effect.

    Args:
        base: the model that the first adapter was made on.
        folder: the first adapter's, which may itself stand on others; or of several.
        config: of the new one.

    Returns:
        The model; the new adapter is called `default`, those beneath `frozen`, `frozen_2` and so on.

    Raises:
        ConfigError: the first adapter does not fit the base, or PEFT cannot have the two together.
    """
    folders = adapter_folders(folder)
    said, places = "', '".join(map(str, folders)), _places(folders)
    if len(folders) > 1:
        _require_sum(places)
    kinds = {kind_of(adapter_config(place)) for place in places}
    if kinds != {kind_of(config)} or config.is_prompt_learning:
        raise ConfigError(
            f"The adapter '{said}' is {', '.join(sorted(kinds))} and the new one over it "
            f"{kind_of(config)}; PEFT has only adapters of one kind on a model, and none of them may be virtual "
            "tokens. Use the same kind, or merge the first into its base with merge_and_unload() and name the result."
        )
    names = _frozen_names(places)
    before = fingerprint(base_tensors(base))
    policy = _load(base, places[0], names[0], trainable=False)
    remember_brought(policy, places[0], names[0])
    _put_beneath(policy, dict(zip(names[1:], places[1:], strict=True)))
    try:
        policy.add_adapter(TRAINED, config)
        _activate(policy, names)
    except ValueError as error:
        raise ConfigError(
            f"No new adapter can be put over '{said}': {' '.join(str(error).split())} Merge that adapter into its "
            "base with merge_and_unload() and name the result."
        ) from error
    if fingerprint(base_tensors(policy)) != before:
        raise ConfigError(
            f"Of the adapters over '{base.config.name_or_path}', one begins by writing into the base weights (as PiSSA "
            "and OLoRA do), on which the others stand too. Take another `init`, or merge the first into its base with "
            "merge_and_unload() and name the result."
        )
    return policy.eval()


def rewrites_base(config: PeftConfig) -> bool:
    """Whether an adapter says that it begins by writing into the base weights; for a base without a source.

    With one, or before and after the adapter is made, fingerprints tell, whatever it says.
    """
    init = getattr(config, "init_lora_weights", None)
    return isinstance(init, str) and init.lower().startswith(_REWRITES_BASE)


def train_new_tokens(config: PeftConfig, ids: list[int], model: PreTrainedModel) -> PeftConfig:
    """The configuration of a new adapter with which new tokens are learnt too, their rows alone.

    Args:
        config: of the adapter.
        ids: of the new tokens, for which the model has room already.
        model: the base.

    Returns:
        The same where whole embeddings are trained by it, or there are no new tokens.

    Raises:
        ConfigError: nothing in this kind of adapter would train them.
    """
    if not ids:
        return config
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embeddings.weight
    modules = [embeddings] + [head] * (not tied)
    names = [name for name, module in model.named_modules() if any(module is one for one in modules)]
    trained = getattr(config, "modules_to_save", None) or []
    if all(any(f".{name}".endswith(f".{one}") for one in trained) for name in names):
        return config
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"add_tokens was given with a {kind_of(config)} adapter, in which nothing would train the new tokens' "
            f"embeddings. Use LoRA, or train them whole with modules_to_save ({', '.join(names)})."
        )
    if config.trainable_token_indices is None:
        logger.info(f"adapter: the {len(ids)} new tokens train beside it, in {', '.join(names)}")
        return replace(config, trainable_token_indices={name: list(ids) for name in names})
    return config


def write_active(model: nn.Module, folder: str | Path) -> None:
    """Say in a folder that PEFT has written which adapters were active, where there were several."""
    inner = unwrap(model)
    if isinstance(inner, PeftModel) and len(inner.active_adapters) > 1:
        said = {"active": inner.active_adapters, "trained": TRAINED}
        (Path(folder) / ACTIVE).write_text(json.dumps(said) + "\n", encoding="utf-8")


def load_active(model: nn.Module | None, folder: str | Path) -> bool:
    """Load the adapters of a checkpoint into a model on which several are active.

    transformers' `Trainer` would load them and leave the first alone active.

    Returns:
        Whether there were several, so that they were loaded here.
    """
    inner = unwrap(model) if model is not None else None
    if not isinstance(inner, PeftModel) or len(inner.active_adapters) < 2:
        return False
    required = [(parameter, parameter.requires_grad) for parameter in inner.parameters()]
    for name in inner.active_adapters:
        place = Path(folder) if name == TRAINED else Path(folder) / name
        if not (place / WEIGHTS).is_file():
            raise ConfigError(f"The checkpoint {folder} lacks the adapter {name!r}, which is active on this model.")
        inner.load_adapter(str(place), name, is_trainable=True, torch_device=str(next(inner.parameters()).device))
    for parameter, value in required:
        parameter.requires_grad_(value)
    return True


def refuse_unfit_virtual_tokens(config: PeftConfig, model: Any) -> None:
    """Refuse the kinds of virtual tokens that cannot be scored, saved or resumed rightly.

    Args:
        config: of the adapter.
        model: the configuration of the model.

    Raises:
        ConfigError: with what to use instead.
    """
    if not config.is_prompt_learning:
        return
    kind = kind_of(config)
    if config.peft_type not in (PeftType.PROMPT_TUNING, PeftType.PREFIX_TUNING):
        raise ConfigError(
            f"peft_config is {kind}, of which PEFT saves what its encoder made and not the encoder, or which needs "
            "inputs of its own, so that a run could not be resumed. Use prompt or prefix tuning, LoRA, or another "
            "adapter on layers."
        )
    if getattr(config, "prefix_projection", False):
        raise ConfigError(
            "peft_config has prefix_projection, whose network PEFT does not save, so that a run could not be resumed. "
            "Leave it out."
        )
    if model.is_encoder_decoder:
        raise ConfigError(
            f"peft_config is {kind}, which PEFT puts before encoder and decoder alike, and a model of "
            f"{type(model).__name__} encodes each prompt once for several completions. Use LoRA or another adapter on "
            "layers."
        )


def virtual_tokens(model: nn.Module) -> int:
    """How many virtual tokens the active adapter puts before each row's embeddings; 0 for none."""
    inner = unwrap(model)
    if not isinstance(inner, PeftModel):
        return 0
    config: Any = inner.active_peft_config
    return config.num_virtual_tokens if config.peft_type == PeftType.PROMPT_TUNING else 0


def kind_of(config: PeftConfig) -> str:
    """Kind of an adapter, as PEFT names it."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def _beneath(folder: Path) -> list[str]:
    """Names of the adapters that were active beside the trained one of a folder."""
    note = folder / ACTIVE
    if not note.is_file():
        return []
    try:
        names = [name for name in json.loads(note.read_text(encoding="utf-8"))["active"] if name != TRAINED]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"'{note}' does not say which adapters were active ({error}); copy it again.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name / WEIGHTS).is_file():
            raise ConfigError(
                f"The adapter '{folder}' was trained over another one, {name!r}, which is not there: it would compute "
                f"something else. Copy the whole folder again, with '{name}' in it."
            )
    return names


def adapter_folders(given: Folders) -> list[Path]:
    """Folders of one adapter or of several, the undermost first."""
    return [Path(one).expanduser() for one in ([given] if isinstance(given, (str, Path)) else given)]


def _places(folders: Sequence[Path]) -> list[Path]:
    """Folders of the adapters of some folders, each with those that it was trained over."""
    return [place for folder in folders for place in (folder, *(folder / name for name in _beneath(folder)))]


def _frozen_names(places: Sequence[Path]) -> list[str]:
    return [_FROZEN if index == 0 else f"{_FROZEN}_{index + 1}" for index in range(len(places))]


def _put_beneath(policy: PeftModel, places: Mapping[str, Path]) -> None:
    """Load further adapters, which are not in effect yet."""
    for name, place in places.items():
        try:
            with put_on(policy.get_base_model(), place):
                policy.load_adapter(str(place), name, torch_device="cpu")
        except ConfigError as error:
            raise ConfigError(
                f"The adapter '{place}' cannot stand beneath another one: {error} Or merge it into its base: {MERGE}."
            ) from error
        remember_brought(policy, place, name)


def _require_sum(places: Sequence[Path]) -> None:
    """Refuse adapters that together are another model than the one in which each was merged before the next was made.

    What LoRA adds to a weight does not depend on the weight, so that several in effect are their sum.
    """
    for number, place in enumerate(places):
        config = adapter_config(place)
        twin = next((one for one in places[:number] if cmp(one / WEIGHTS, place / WEIGHTS, shallow=False)), None)
        if twin is not None:
            raise ConfigError(
                f"The adapters '{twin}' and '{place}' have the same weights, which would count twice. Name one of them."
            )
        own = getattr(config, "modules_to_save", None) or getattr(config, "trainable_token_indices", None)
        if not isinstance(config, LoraConfig) or config.use_dora or own:
            kind = f"{kind_of(config)} with modules of its own" if own else kind_of(config)
            kind = "DoRA" if getattr(config, "use_dora", False) else kind
            raise ConfigError(
                f"The adapter '{place}' is {kind}, which several adapters cannot have among them: what it changes "
                f"depends on the weights under it. Merge each but the last into the result so far: {MERGE}. Then name "
                "the merged folder as the model, and the last adapter alone."
            )


def _load(base: PreTrainedModel, folder: Path, name: str, *, trainable: bool) -> PeftModel:
    theirs, ours = adapter_config(folder).base_model_name_or_path, base.config.name_or_path
    if theirs and ours and theirs != ours:
        logger.warning(f"adapter: '{folder}' was made on {theirs!r} and is put on {ours!r}")
    with put_on(base, folder), warnings.catch_warnings():
        warnings.filterwarnings("error", ADAPTER_INCOMPLETE)
        _make_room(base, folder)
        return PeftModel.from_pretrained(base, str(folder), adapter_name=name, is_trainable=trainable)


def _make_room(base: PreTrainedModel, folder: Path) -> None:
    """An adapter that was trained with new tokens brings embeddings of more rows than its base has."""
    embeddings: Any = base.get_input_embeddings()
    name = next((name for name, module in base.named_modules() if module is embeddings), "")
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        whole = [key for key in file.keys() if f".{name}." in key and key.endswith(".weight") and "lora_" not in key]  # noqa: SIM118
        rows = max((file.get_slice(key).get_shape()[0] for key in whole), default=0)
    if rows > embeddings.weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)


def _continue_virtual_tokens(base: PreTrainedModel, folder: Path, config: PeftConfig) -> PeftModel:
    """PEFT loads virtual tokens for inference only; so they are made anew and given the saved values."""
    refuse_unfit_virtual_tokens(config, base.config)
    with put_on(base, folder):
        policy = cast(PeftModel, get_peft_model(base, replace(config, inference_mode=False)))
        policy.load_adapter(str(folder), TRAINED, is_trainable=True, torch_device="cpu")
    remember_brought(policy, folder, TRAINED)
    return policy.eval()


def _activate(policy: PeftModel, beneath: list[str]) -> None:
    """Everything in effect, and of it only `default` training."""
    policy.active_adapter = TRAINED
    set_active(policy, [TRAINED, *beneath], trains=True)
    policy.set_requires_grad(beneath, False)
