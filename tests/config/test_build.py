"""From a run file to the trainer's arguments."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from tether.config import RunConfig, build, check_run, split_batch
from tether.config.arguments import objective_arguments
from tether.errors import ConfigError
from tether.training import DPOConfig
from tether.training.callbacks import WatchLoss


def run_with(**sections: Any) -> RunConfig:
    values = {"model": "tiny", "data": {"train": "pairs.jsonl"}, "output": "unused"}
    return check_run({**values, **sections})


def test_defaults_are_those_of_the_python_configuration() -> None:
    run, defaults = run_with(), {field.name: field.default for field in dataclasses.fields(DPOConfig)}
    defaults["loss_type"] = "sigmoid"  # of a list, as argument parsers want it: its factory gives ["sigmoid"]
    assert DPOConfig.__dataclass_fields__["loss_type"].default_factory() == ["sigmoid"]
    assert defaults["num_train_epochs"] == run.train.epochs
    assert defaults["per_device_train_batch_size"] == run.train.batch_size
    arguments = objective_arguments(run.objective)
    assert {name: defaults[name] for name in arguments} == arguments
    assert arguments.keys() == {"loss_type", "loss_weights", "beta", *run.objective.further} - {"weights"}
    for name in ("learning_rate", "max_length", "max_steps"):
        assert defaults[name] == getattr(run.train, name)


def test_every_section_arrives() -> None:
    arguments, adapter, keywords = build(
        run_with(
            model={
                "name": "tiny",
                "dtype": "float32",
                "attention": "eager",
                "revision": "main",
                "quantization": "nf4",
                "device": "cuda:1",
                "tokenizer": "other",
                "adapter": "runs/sft",
                "trust_remote_code": True,
                "add_tokens": ["<a>"],
                "chat_template": "other.jinja",
                "train": ["norm"],
                "freeze": ["post"],
                "processor": {"crop_to_patches": True},
            },
            lora={
                "r": 4,
                "alpha": 8,
                "target": ["q_proj"],
                "bias": "lora_only",
                "rslora": True,
                "init": "olora",
                "target_parameters": ["mlp.experts.down_proj"],
            },
            data={
                "train": ["a.jsonl", "b.jsonl"],
                "eval": {"x": "c.jsonl"},
                "check": {"identical": 0.1},
                "images": {"max_pixels": 99},
            },
            reference={"meaning": "start", "method": "snapshot"},
            objective={"beta": 0.3, "label_smoothing": 0.1},
            train={"epochs": 2, "learning_rate": 5e-6, "batch_size": 12, "max_length": 99, "logging_steps": 7},
        )
    )
    assert (arguments.num_train_epochs, arguments.learning_rate, arguments.logging_steps) == (2, 5e-6, 7)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (12, 1)
    assert (arguments.beta, arguments.label_smoothing, arguments.max_length) == (0.3, 0.1, 99)
    assert (arguments.reference, arguments.reference_method) == ("start", "snapshot")
    assert arguments.model_init_kwargs == {
        "dtype": "float32",
        "attn_implementation": "eager",
        "revision": "main",
        "quantization": "nf4",
        "device_map": "cuda:1",
        "tokenizer": "other",
        "adapter": "runs/sft",
        "trust_remote_code": True,
        "processor": {"crop_to_patches": True},
    }
    assert arguments.image_sizes == {"max_pixels": 99}
    assert arguments.trust_remote_code is False, "which would be the reference's too"
    assert arguments.add_tokens == ["<a>"]
    assert (arguments.chat_template_path, arguments.dataset_check) == ("other.jinja", {"identical": 0.1})
    assert (arguments.train_parameters, arguments.freeze_parameters) == (["norm"], ["post"])
    assert adapter is not None
    assert (adapter.r, adapter.lora_alpha, adapter.target_modules) == (4, 8, {"q_proj"})
    assert (adapter.bias, adapter.use_rslora, adapter.init_lora_weights) == ("lora_only", True, "olora")
    assert adapter.target_parameters == ["mlp.experts.down_proj"]
    assert keywords == {
        "model": "tiny",
        "ref_model": None,
        "train_dataset": ["a.jsonl", "b.jsonl"],
        "eval_dataset": {"x": "c.jsonl"},
    }


def test_details_of_four_bits_need_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is missed before rows are read, as for a quantisation by name."""
    detailed = run_with(model={"name": "tiny", "quantization": {"type": "fp4", "double": False}})
    monkeypatch.setattr("tether.models.quantized.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match="quantization has details of 4 bits, which needs bitsandbytes, and it is not"
    ):
        build(detailed)
    monkeypatch.setattr("tether.models.quantized.find_spec", lambda name: object())
    found = build(detailed)[0].model_init_kwargs["quantization_config"]
    assert (found["bnb_4bit_quant_type"], found["bnb_4bit_use_double_quant"]) == ("fp4", False)


def test_a_reference_left_out_stays_undeclared() -> None:
    assert build(run_with())[0].reference is None
    assert build(run_with(reference="start"))[0].reference == "start"
    arguments, _, keywords = build(run_with(reference={"model": "other"}))
    assert (arguments.reference, keywords["ref_model"]) == ("model", "other")


def test_every_form_of_a_reference_reaches_the_configuration() -> None:
    full = {"model": "o", "revision": "v1", "dtype": "bfloat16", "quantization": "4bit", "device": "cpu"}
    arguments, _, keywords = build(run_with(reference={**full, "attention": "eager"}))
    assert keywords["ref_model"] == "o"
    assert arguments.ref_model_init_kwargs == {
        "revision": "v1",
        "dtype": "bfloat16",
        "quantization": "4bit",
        "device_map": "cpu",
        "attn_implementation": "eager",
    }
    arguments = build(run_with(reference={"adapter": "sft", "method": "snapshot", "snapshot": "host"}))[0]
    assert (arguments.reference, arguments.reference_adapter, arguments.reference_method) == (
        "adapter",
        "sft",
        "snapshot",
    )
    assert arguments.reference_snapshot == "host"
    arguments = build(run_with(reference={"sync": {"steps": 7, "alpha": 1.0}}))[0]
    assert (arguments.sync_ref_model, arguments.ref_model_sync_steps, arguments.ref_model_mixup_alpha) == (True, 7, 1.0)
    arguments = build(run_with(reference={"remote": {"url": "http://host:1", "model": "m"}}))[0]
    assert (arguments.reference, arguments.reference_method) == ("model", "remote")
    assert arguments.reference_remote["model"] == "m"
    arguments = build(run_with(reference={"meaning": "start", "remote": {"url": "http://host:1"}}))[0]
    assert (arguments.reference, arguments.reference_method) == ("start", "remote")


@pytest.mark.parametrize(
    ("train", "devices", "split"),
    [
        ({}, 1, (8, 1)),
        ({"batch_size": 32}, 1, (32, 1)),
        ({"batch_size": 32}, 4, (8, 1)),
        ({"batch_size": 32, "max_tokens_per_forward": 2048}, 1, (32, 1)),
        ({"batch_size": 32, "max_tokens_per_forward": None}, 1, (4, 8)),
        ({"batch_size": 32, "max_tokens_per_forward": None}, 4, (4, 2)),
        ({"batch_size": 3, "max_tokens_per_forward": None}, 1, (3, 1)),
        ({"batch_size": 7, "max_tokens_per_forward": None}, 1, (1, 7)),
        ({"batch_size": 18, "max_tokens_per_forward": None}, 1, (3, 6)),
        ({"batch_size": 32, "per_device_train_batch_size": 16}, 1, (16, 2)),
        ({"batch_size": 32, "gradient_accumulation_steps": 2}, 2, (8, 2)),
        ({"batch_size": 6, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, 1, (3, 2)),
        ({"per_device_train_batch_size": 3}, 1, (3, 1)),
        ({"gradient_accumulation_steps": 5}, 1, (4, 5)),
    ],
)
def test_pairs_per_step_are_split(train: dict[str, Any], devices: int, split: tuple[int, int]) -> None:
    assert split_batch(run_with(train=train), devices) == split
    if "batch_size" in train:
        assert split[0] * split[1] * devices == train["batch_size"]


@pytest.mark.parametrize(
    ("train", "devices", "message"),
    [
        (
            {"batch_size": 6},
            4,
            "`train.batch_size` is 6 pairs per step, which 4 devices cannot make up. Set it to a multiple of 4.",
        ),
        (
            {"batch_size": 32, "per_device_train_batch_size": 3},
            1,
            "Set it to a multiple of 3, or leave the other keys out.",
        ),
        (
            {"batch_size": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            1,
            "1 device with 2 pairs a micro-batch, 2 micro-batches cannot make up. Set it to 4, or",
        ),
        (
            {"per_device_train_batch_size": 0},
            1,
            "`train.per_device_train_batch_size` is 0; allowed is a whole number from 1.",
        ),
    ],
)
def test_a_split_that_cannot_be_is_refused(train: dict[str, int], devices: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_batch(run_with(train=train), devices)
    assert message in str(caught.value)


def test_prompts_per_step_are_split_by_their_completions() -> None:
    def run(size: int, **train: Any) -> RunConfig:
        sampled = {"objective": {"loss": "grpo"}, "rollout": {"group": 6}, "rewards": [{"name": "length", "target": 3}]}
        return run_with(train={"batch_size": size, **train}, **sampled)

    assert split_batch(run(2), 4) == (3, 1)
    said = (
        "`train.batch_size` is 1 x 6 completions per step, which 4 devices cannot make up. Set it to a multiple of 2."
    )
    with pytest.raises(ConfigError, match=re.escape(said)):
        split_batch(run(1), 4)
    with pytest.raises(ConfigError, match=r"2 devices with 9 completions a micro-batch cannot make up.*multiple of 3,"):
        split_batch(run(2, per_device_train_batch_size=9), 2)


def test_devices_are_counted_by_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="3 devices cannot make up"):
        build(run_with(train={"batch_size": 8}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"loss": "sigmoud"}}, "`objective.loss` 'sigmoud' is not known; did you mean sigmoid?"),
        ({"objective": {"beta": -1}}, "run: `objective.beta` is -1 (a whole number); allowed is a number above 0."),
        (
            {"objective": {"label_smoothing": 0.7}},
            "`objective.label_smoothing` is 0.7 (a number with a fraction); allowed is a number at least 0 and below",
        ),
        ({"reference": {"meaning": "base", "method": "model"}}, "cannot compute the meaning 'base'"),
        ({"train": {"truncation_mode": "keep"}}, "`train.truncation_mode` is 'keep'"),
        (
            {"train": {"max_tokens_per_forward": "much"}},
            "`train.max_tokens_per_forward` is 'much' (text); allowed is `auto`, null or a whole",
        ),
        ({"lora": {"dropout": 0.1}}, "`lora.dropout` is 0.1, but every dropout is switched off"),
        ({"train": {"eval_strategy": "steps"}}, "`train.eval_strategy` is steps, but there is nothing to evaluate."),
        (
            {"train": {"lr_scheduler_kwargs": "{"}},
            "`train.lr_scheduler_kwargs` is '{', which is not JSON",
        ),
        (
            {"train": {"load_best_model_at_end": True, "eval_strategy": "epoch"}, "data": {"train": "a", "eval": "b"}},
            "refuses the keys of `train` together: --load_best_model_at_end requires the save and eval",
        ),
    ],
)
def test_values_that_do_not_go_together_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(run_with(**sections))
    assert "\n" not in str(caught.value)


def test_adapter_dropout_needs_dropout() -> None:
    _, adapter, _ = build(run_with(lora={"dropout": 0.1}, train={"disable_dropout": False}))
    assert adapter is not None
    assert adapter.lora_dropout == 0.1


@pytest.mark.parametrize(
    ("section", "kind", "values"),
    [
        ({"type": "vera", "r": 4, "target_modules": ["q_proj"]}, "VERA", {"r": 4, "target_modules": {"q_proj"}}),
        ({"type": "ia3", "target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, "IA3", {}),
        ({"type": "prompt", "num_virtual_tokens": 5}, "PROMPT_TUNING", {"num_virtual_tokens": 5}),
        ({"type": "prefix", "num_virtual_tokens": 5}, "PREFIX_TUNING", {"num_virtual_tokens": 5}),
        ({"type": "lora", "rank_pattern": {"q_proj": 2}}, "LORA", {"rank_pattern": {"q_proj": 2}}),
        ({"type": "layer_norm"}, "LN_TUNING", {}),
    ],
)
def test_every_kind_of_adapter_arrives(section: dict[str, Any], kind: str, values: dict[str, Any]) -> None:
    _, adapter, _ = build(run_with(peft=section))
    assert adapter is not None
    assert adapter.peft_type.value == kind
    assert {name: getattr(adapter, name) for name in values} == values
    assert build(run_with(peft=section, objective={"loss": "reward"}))[1].task_type == "SEQ_CLS"  # type: ignore[union-attr]


def test_adapters_that_peft_refuses_or_that_would_do_nothing() -> None:
    outside = {"type": "ia3", "target_modules": ["v_proj"], "feedforward_modules": ["down_proj"]}
    with pytest.raises(ConfigError, match=r"`peft` is what PEFT refuses: .*feedforward_modules"):
        build(run_with(peft=outside))
    with pytest.raises(ConfigError, match=r"`peft.vera_dropout` is 0.1, but every dropout is switched off"):
        build(run_with(peft={"type": "vera", "vera_dropout": 0.1}))


def test_a_store_alone_declares_no_meaning(tmp_path):
    """A model that Tether trained must go on asking which reference is meant, with a store too."""
    written = {"model": "tiny", "data": {"train": "pairs.jsonl"}, "reference": {"store": "log_probs"}}
    arguments, _, _ = build(check_run({**written, "output": str(tmp_path)}))
    assert (arguments.reference, arguments.reference_store) == (None, "log_probs")
    written["reference"] = {"meaning": "start", "store": "log_probs", "store_dtype": "float16"}
    arguments, _, _ = build(check_run({**written, "output": str(tmp_path)}))
    assert (arguments.reference, arguments.reference_store_dtype) == ("start", "float16")


def test_callbacks_end_a_run() -> None:
    stopping, watchdog = build(
        run_with(
            data={"train": "pairs.jsonl", "eval": "held.jsonl"},
            train={"eval_strategy": "steps"},
            callbacks={
                "early_stopping": {"patience": 2, "threshold": 0.5},
                "loss_watchdog": {"threshold": 2.0, "patience": 2},
            },
        )
    )[2]["callbacks"]
    assert isinstance(stopping, EarlyStoppingCallback)
    assert (stopping.early_stopping_patience, stopping.early_stopping_threshold) == (2, 0.5)
    assert isinstance(watchdog, WatchLoss)
    control, ended = TrainerControl(), []
    logs = [{"loss": loss} for loss in (3.0, 2.0, 2.5)] + [{"eval_loss": 9.0}, {"loss": 2.1}]
    for step, log in enumerate(logs):
        watchdog.on_log(TrainingArguments("unused"), TrainerState(global_step=step), control, logs=log)
        ended.append(control.should_training_stop)
    # A loss at the threshold begins the count again; an evaluation is not counted.
    assert ended == [False, False, False, False, True]
