"""Preference training of vision-language models, end to end: LLaVA-like and Qwen2-VL-like."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from tether import DPOConfig, DPOTrainer
from tether.errors import DataError
from tether.models import load_policy
from tether.models.structure import evaluation_mode
from tether.scoring import score
from tiny import QUIET, tiny_tokenizer
from tiny_vision import VISION, picture, tiny_processor, tiny_vision


def rows(count=8):
    """One image or two, of several sizes."""
    words = ["good", "bad", "a long and winding film", "not what I liked", "fine"]
    return [
        {
            "images": [picture(i + k, 16 + 8 * (i % 2), 16) for k in range(1 + i % 2)],
            "prompt": [{"role": "user", "content": "the film was" + " it" * (i % 3)}],
            "chosen": [{"role": "assistant", "content": words[i % 5]}],
            "rejected": [{"role": "assistant", "content": words[(i + 1) % 5]}],
        }
        for i in range(count)
    ]


def trainer(folder, family, model=None, *, peft_config=None, data=None, processing=None, **changes):
    settings = {
        "per_device_train_batch_size": 8,  # all rows, so that every step must improve on them
        "max_steps": 4,
        "learning_rate": 0.002,
        "lr_scheduler_type": "constant",
        **QUIET,
        "reference_check_steps": 2,
        **changes,
    }
    return DPOTrainer(
        model=tiny_vision(family) if model is None else model,
        args=DPOConfig(output_dir=str(folder), **settings),
        train_dataset=rows() if data is None else data,
        processing_class=processing or tiny_processor(family),
        peft_config=peft_config,
    )


def losses(run):
    return [log["loss"] for log in run.state.log_history if "loss" in log]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(("adapter", "method"), [(False, "snapshot"), (True, "adapter_off"), (True, "snapshot")])
@pytest.mark.parametrize("family", VISION)
@pytest.mark.sweep(1)
def test_dpo_starts_at_its_reference_and_learns(family, adapter, method, checkpointing, tmp_path):
    """INV-1, 2, 5, 15: ln 2 at step 1 in the tree layout, with one image, two, and images of several sizes."""
    run = trainer(
        tmp_path,
        family,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if adapter else None,
        reference="start",
        reference_method=method,
        gradient_checkpointing=checkpointing,
    )
    before = {name: p.detach().clone() for name, p in run.policy.named_parameters() if p.requires_grad}
    run.train()
    assert run.run.layout == "tree"
    assert run.run.reference.identity.method == method
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(run)[-1] < math.log(2)
    moved = [n for n, p in run.policy.named_parameters() if p.requires_grad and not torch.equal(p, before[n])]
    assert any("vision" in name or "visual" in name for name in moved)
    assert any("language_model" in name for name in moved)


@pytest.mark.parametrize("family", VISION)
@pytest.mark.sweep(1)
def test_layouts_train_alike(family, tmp_path):
    """INV-19: losses of whole runs in both layouts."""
    runs = [trainer(tmp_path / layout, family, scoring_layout=layout) for layout in ("tree", "padded")]
    for run in runs:
        run.train()
    torch.testing.assert_close(losses(runs[0]), losses(runs[1]), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_what_is_trained_on_is_the_image(tmp_path):
    """Negative control: other pixels, all else alike, give other losses. A `datasets.Dataset` gives the same."""
    other = [{**row, "images": [picture(99 + i)] * len(row["images"])} for i, row in enumerate(rows())]
    runs = {}
    for name, data in {"list": rows(), "dataset": Dataset.from_list(rows()), "other": other}.items():
        run = trainer(tmp_path / name, "llava", data=data)
        run.train()
        runs[name] = losses(run)
    assert runs["list"] == runs["dataset"]
    assert max(abs(a - b) for a, b in zip(runs["list"], runs["other"], strict=True)) > 1e-3


@pytest.mark.slow
def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path):
    """INV-7, exactly; images are read again from the rows."""
    whole = trainer(tmp_path / "whole", "qwen2_vl")
    whole.train()
    trainer(tmp_path / "half", "qwen2_vl", save_strategy="steps", save_steps=2, max_steps=2).train()
    rest = trainer(tmp_path / "half", "qwen2_vl")
    rest.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, rest.policy.state_dict()[name]), name


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.sweep(1)
def test_the_artefact_scores_as_the_model_did(adapter, tmp_path):
    """INV-38: from disk, processor included, in plain transformers and peft, and by name."""
    tiny_vision("llava").save_pretrained(tmp_path / "base")
    tiny_processor("llava").save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules="all-linear") if adapter else None
    run = DPOTrainer(
        model=str(tmp_path / "base"),
        args=DPOConfig(
            output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=0.01, report_to="none", use_cpu=True
        ),
        train_dataset=rows(),
        peft_config=lora,
    )
    run.train()
    run.save_model()
    assert isinstance(run.processing_class, type(tiny_processor("llava")))
    folder = tmp_path / "run"
    if adapter:
        base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
        again = [PeftModel.from_pretrained(base, folder), load_policy(folder)]
    else:
        again = [AutoModelForImageTextToText.from_pretrained(folder), load_policy(folder)]
        assert AutoProcessor.from_pretrained(folder).image_token == "<image>"
    with torch.no_grad(), evaluation_mode(run.policy):
        expected = score(run.policy, run.run.probe).token_logps
        for model in again:
            found = score(model.eval(), run.run.probe).token_logps
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_images_without_a_processor_are_refused(tmp_path):
    with pytest.raises(DataError, match="processing_class"):
        trainer(tmp_path, "llava", processing=tiny_tokenizer())


@pytest.mark.slow
@pytest.mark.parametrize("family", VISION)
def test_a_token_budget_splits_images_with_their_prompts(family, tmp_path):
    """INV-25: the split of a step changes no loss."""
    whole = trainer(tmp_path / "whole", family)
    split = trainer(tmp_path / "split", family, max_tokens_per_forward=100)
    forwards = []
    handle = split.policy.get_output_embeddings().register_forward_pre_hook(lambda *_: forwards.append(1))
    for run in (whole, split):
        forwards.clear()
        run.train()
    handle.remove()
    assert len(forwards) > 3 * whole.state.global_step
    torch.testing.assert_close(losses(whole), losses(split), atol=1e-4, rtol=0)
