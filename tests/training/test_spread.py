"""A model that a device_map has spread over two devices scores and trains as on one.

The second device is torch's lazy one, which every build has: its tensors are not those of the processor, and a sum of
the two is an error, as with two GPUs. It does not know every operation, so that only a norm is put there.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch._lazy
import torch._lazy.ts_backend
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from tether import DPOConfig, DPOTrainer
from tether.errors import ConfigError
from tether.scoring import pack, score
from tiny import QUIET, pair_rows, ragged_examples, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module", autouse=True)
def second():
    torch._lazy.ts_backend.init()


def spread(model):
    """What accelerate does for a device map: each part on its device, with a hook that sends it its inputs."""
    inner, places = model.model, {}
    parts = {"model.embed_tokens": inner.embed_tokens, "model.rotary_emb": inner.rotary_emb}
    parts |= {f"model.layers.{i}": layer for i, layer in enumerate(inner.layers)}
    for name, part in {**parts, "model.norm": inner.norm, "lm_head": model.lm_head}.items():
        places[name] = "lazy:0" if name == "model.norm" else "cpu"
        hook = AlignDevicesHook(execution_device=torch.device(places[name]), io_same_device=False)
        add_hook_to_module(part.to(places[name]), hook)
    add_hook_to_module(model, AlignDevicesHook(execution_device=torch.device("cpu"), io_same_device=True))
    model.hf_device_map = places
    return model


def test_the_devices_do_not_mix():
    """Negative control: what is left on the wrong device is an error, so that the runs below show that nothing is."""
    with pytest.raises(RuntimeError, match="not a lazy tensor"):
        torch.zeros(2, device="lazy:0") + torch.zeros(2)


@pytest.mark.parametrize("way", [{"backend": "blocked"}, {"backend": "sdpa"}, {"layout": "padded"}], ids=str)
def test_scores_and_gradients(way):
    one = tiny_model()
    two, batch = spread(copy.deepcopy(one)), pack(ragged_examples())
    assert {p.device.type for p in two.parameters()} == {"cpu", "lazy"}
    found, expected = (score(model, batch, outputs=("entropy", "top1"), **way) for model in (two, one))
    for name in ("token_logps", "entropy", "top1"):
        assert getattr(found, name).device.type == "cpu"
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-6, rtol=0)
    found.token_logps.sum().backward()
    expected.token_logps.sum().backward()
    for mine, other in zip(two.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.cpu(), other.grad, atol=1e-4, rtol=1e-4)


def policy():
    torch.manual_seed(0)
    return tiny_model(vocab_size=len(TOKENIZER), pad_token_id=0, bos_token_id=1, eos_token_id=2)


def trainer(folder, model, **options):
    return DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(folder), max_steps=3, learning_rate=0.1, optim="sgd", **QUIET, **options),
        train_dataset=Dataset.from_list(pair_rows(8)),
        eval_dataset=Dataset.from_list(pair_rows(3)),
        processing_class=TOKENIZER,
    )


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", ["lora", "full", "moving"])
def test_a_run(kind, tmp_path):
    """Losses, metrics and weights of a run are those on one device: LoRA, full fine-tuning, a moving reference."""
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1} if kind == "moving" else {}
    runs = []
    for place in ("one", "two"):
        model = spread(policy()) if place == "two" else policy()
        if kind == "lora":
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        run = trainer(tmp_path / place, model, reference_check_steps=1, **options)
        run.train()
        losses = [row["loss"] for row in run.state.log_history if "loss" in row]
        runs.append((losses, run.evaluate()["eval_loss"], [p.detach().cpu() for p in run.policy.parameters()]))
        assert {p.device.type for p in run.policy.parameters()} == ({"cpu", "lazy"} if place == "two" else {"cpu"})
    (losses, evaluation, weights), (others, other_evaluation, other_weights) = runs
    assert others == pytest.approx(losses, abs=1e-6)
    assert losses[0] > losses[-1]
    assert other_evaluation == pytest.approx(evaluation, abs=1e-6)
    for one, two in zip(weights, other_weights, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_a_policy_that_begins_elsewhere_is_refused(tmp_path):
    """Where the batches are, its first layer must be; a device map of one device is taken."""
    model = policy()
    model.hf_device_map = {"": "cpu"}
    trainer(tmp_path, model)
    model.model.embed_tokens.to("lazy:0")
    with pytest.raises(ConfigError, match="has put the policy on lazy:0, and the run computes on cpu"):
        trainer(tmp_path, model)


def test_weights_outside_the_devices_are_refused(tmp_path):
    model = policy()
    model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    model.lm_head.to("meta")
    with pytest.raises(ConfigError, match="over cpu, disk and left weights outside the devices"):
        trainer(tmp_path, model)


def test_several_processes_want_one_device_each(tmp_path, monkeypatch):
    monkeypatch.setattr(DPOConfig, "world_size", 2)
    with pytest.raises(ConfigError, match="over cpu, lazy:0, and the run has 2 processes"):
        trainer(tmp_path, spread(policy()))
