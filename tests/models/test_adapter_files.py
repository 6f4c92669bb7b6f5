"""The two files of an adapter, each damaged in turn: one message that names it, and nothing is run."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, save

from tether.errors import ConfigError
from tether.models.adapters import continue_adapter
from tether.models.adapting.adapter_files import write_sums
from tiny import tiny_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def tensors(change):
    return lambda content: save({name: change(name, value) for name, value in load(content).items()})


def config(**changes):
    return lambda content: json.dumps(json.loads(content) | changes).encode()


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


DAMAGE = {
    "removed": (WEIGHTS, None, "has no adapter_model"),
    "empty": (WEIGHTS, lambda content: b"", "cannot be read"),
    "half": (WEIGHTS, lambda content: content[: len(content) // 2], "cannot be read"),
    "a byte more": (WEIGHTS, lambda content: content + b"x", "cannot be read"),
    "zeros": (WEIGHTS, lambda content: bytes(len(content)), "cannot be read"),
    "pickle": (WEIGHTS, lambda content: pickle.dumps(Evil()), "cannot be read"),
    "a bit of a number": (
        WEIGHTS,
        lambda content: content[:-2] + bytes([content[-2] ^ 1]) + content[-1:],
        "other bytes",
    ),
    "other shape": (WEIGHTS, tensors(lambda name, value: value[:1]), "other bytes"),
    "config removed": (CONFIG, None, CONFIG),
    "config half": (CONFIG, lambda content: content[: len(content) // 2], "cannot be read"),
    "config null": (CONFIG, lambda content: b"null", "cannot be read"),
    "config deep": (CONFIG, lambda content: b"[" * 200_000, "cannot be read"),
    "config pickle": (CONFIG, lambda content: pickle.dumps(Evil()), "cannot be read"),
    "base of another type": (CONFIG, config(base_model_name_or_path=7), "must be text"),
    "rank in words": (CONFIG, config(r="four"), "does not fit"),
    "rank that fills the memory": (CONFIG, config(r=10**9), "at most"),
    "alpha not finite": (CONFIG, config(lora_alpha=float("inf")), "must be a finite number"),
    "targets not a pattern": (CONFIG, config(target_modules="((("), "does not fit"),
    "targets of another type": (CONFIG, config(target_modules=7), "does not fit"),
}
# Of an adapter that others saved, beside which no hash lies.
OTHERS = {
    "other shape": (WEIGHTS, tensors(lambda name, value: value[:1]), "does not fit"),
    "not finite": (WEIGHTS, tensors(lambda name, value: value * torch.nan), "not finite"),
    "other names": (WEIGHTS, lambda content: save({f"x.{k}": v for k, v in load(content).items()}), "does not fit"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    targets = ["q_proj", "v_proj"]
    policy = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    policy.save_pretrained(folder)
    write_sums(policy, folder)
    return folder


def damaged(saved, folder, file, change):
    shutil.copytree(saved, folder)
    if change is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(change((folder / file).read_bytes()))
    return folder


def test_a_whole_one_is_continued(saved):
    assert continue_adapter(tiny_model(), saved).peft_config["default"].r == 4


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_refused_by_its_name(saved, tmp_path, kind):
    file, change, said = DAMAGE[kind]
    with pytest.raises(ConfigError, match=said) as refused:
        continue_adapter(tiny_model(), damaged(saved, tmp_path / "bad", file, change))
    assert "bad" in str(refused.value)


@pytest.mark.parametrize("kind", OTHERS)
def test_one_without_a_hash_is_refused_by_what_it_holds(saved, tmp_path, kind):
    file, change, said = OTHERS[kind]
    folder = damaged(saved, tmp_path / "bad", file, change)
    (folder / f"{WEIGHTS}.sha256").unlink()
    with pytest.raises(ConfigError, match=said):
        continue_adapter(tiny_model(), folder)
