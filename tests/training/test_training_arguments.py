"""Every option of transformers' TrainingArguments: honoured, refused with its reason, or without effect, as docs say.

One table. A version of transformers with an option that is not in it fails here, and so does one that drops an option.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import TrainingArguments

from tether import DPOConfig, DPOTrainer
from tether.errors import ConfigError
from tether.models.load import load_policy
from tether.training.saving.preflight import check_before_loading
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS = Dataset.from_list(pair_rows(8))


class Honoured(NamedTuple):
    """The value is kept, and a run with it trains; `beside` are options that it needs."""

    value: Any
    beside: Mapping[str, Any] = MappingProxyType({})


class Refused(NamedTuple):
    """The value is an error that names the field, with these words."""

    value: Any
    words: str


class Elsewhere(NamedTuple):
    """It needs a machine, a package or a launcher that tests have not; the reason, and where it is tested if it is."""

    reason: str


class Idle(NamedTuple):
    """It changes nothing that a trainer does; the reason."""

    value: Any
    reason: str


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
SAVED = {"save_strategy": "steps", "save_steps": 1}
GPU = "a device that is not a CPU"
TRACKIO = "of the tracker trackio"
HUB = "of the hub, which tests never reach"
WORKERS = {"dataloader_num_workers": 1}
TABLE: dict[str, Honoured | Refused | Elsewhere | Idle] = {
    "output_dir": Elsewhere("in every run of these tests"),
    "per_device_train_batch_size": Honoured(2),
    "num_train_epochs": Honoured(1.0, {"max_steps": -1}),
    "max_steps": Honoured(2),
    "learning_rate": Honoured(1e-4),
    "lr_scheduler_type": Honoured("cosine"),
    "lr_scheduler_kwargs": Honoured({"num_cycles": 2}, {"lr_scheduler_type": "cosine_with_restarts"}),
    "warmup_steps": Honoured(1),
    "optim": Honoured("adafactor"),
    "optim_args": Honoured("momentum=0.5", {"optim": "sgd"}),
    "weight_decay": Honoured(0.1),
    "adam_beta1": Honoured(0.8),
    "adam_beta2": Honoured(0.9),
    "adam_epsilon": Honoured(1e-6),
    "optim_target_modules": Elsewhere("of layer-wise optimizers: tests/training/test_saving.py and their packages"),
    "gradient_accumulation_steps": Honoured(2),
    "average_tokens_across_devices": Refused(False, "denominators of the whole step"),
    "max_grad_norm": Honoured(0.5),
    "label_smoothing_factor": Refused(0.1, "`label_smoothing` is the objective's"),
    "bf16": Honoured(True),
    "fp16": Refused(True, "computes on a CPU, which has no float16"),
    "bf16_full_eval": Refused(True, "evaluation scores as training does"),
    "fp16_full_eval": Refused(True, "evaluation scores as training does"),
    "tf32": Elsewhere(GPU),
    "activation_checkpointing": Honoured(True),
    "activation_checkpointing_kwargs": Honoured({"use_reentrant": False}, {"activation_checkpointing": True}),
    "gradient_checkpointing": Honoured(True),
    "gradient_checkpointing_kwargs": Honoured({"use_reentrant": False}, {"gradient_checkpointing": True}),
    "torch_compile": Honoured(True, {"torch_compile_backend": "aot_eager"}),  # inductor needs a C++ compiler
    "torch_compile_backend": Honoured("aot_eager"),
    "torch_compile_mode": Elsewhere("see torch_compile"),
    "use_liger_kernel": Refused(True, "replace the model's forward"),
    "liger_kernel_config": Refused({"rope": True}, "replace the model's forward"),
    "use_cache": Refused(True, "no use of a key-value cache"),
    "neftune_noise_alpha": Elsewhere(
        "tests/training/test_before_weights.py: noise that depends on nothing but the sequence"
    ),
    "torch_empty_cache_steps": Refused(1, "max_tokens_per_forward"),
    "auto_find_batch_size": Honoured(True),
    "logging_strategy": Honoured("epoch"),
    "logging_steps": Honoured(2),
    "logging_first_step": Honoured(True, {"logging_steps": 2}),
    "log_on_each_node": Honoured(False),
    "logging_nan_inf_filter": Refused(True, "must be seen"),
    "include_num_input_tokens_seen": Refused("all", "num_tokens is logged in any case"),
    "log_level": Honoured("error"),
    "log_level_replica": Honoured("error"),
    "disable_tqdm": Honoured(True),
    "report_to": Honoured("none"),
    "run_name": Honoured("name"),
    "project": Idle("name", TRACKIO),
    "trackio_space_id": Idle("name", TRACKIO),
    "trackio_bucket_id": Idle("name", TRACKIO),
    "trackio_static_space_id": Idle("name", TRACKIO),
    "eval_strategy": Honoured("epoch"),
    "eval_steps": Honoured(1, EVALUATED),
    "eval_delay": Honoured(1, EVALUATED),
    "per_device_eval_batch_size": Honoured(2, EVALUATED),
    "prediction_loss_only": Refused(True, "predictions are kept for compute_metrics alone"),
    "eval_on_start": Honoured(True, EVALUATED),
    "eval_do_concat_batches": Refused(False, "one array of all rows"),
    "eval_use_gather_object": Refused(True, "consists of tensors"),
    "eval_accumulation_steps": Refused(2, "no logits are kept"),
    "include_for_metrics": Refused(["loss"], "compute_metrics"),
    "batch_eval_metrics": Refused(True, "compute_metrics"),
    "save_only_model": Honoured(True, SAVED),
    "save_strategy": Honoured("epoch"),
    "save_steps": Honoured(1, SAVED),
    "save_on_each_node": Honoured(True, SAVED),
    "save_total_limit": Honoured(1, SAVED),
    "enable_jit_checkpoint": Honoured(True),
    "push_to_hub": Elsewhere(HUB),
    "hub_token": Elsewhere(HUB),
    "hub_private_repo": Elsewhere(HUB),
    "hub_model_id": Elsewhere(HUB),
    "hub_strategy": Elsewhere(HUB),
    "hub_always_push": Elsewhere(HUB),
    "hub_revision": Elsewhere(HUB),
    "load_best_model_at_end": Honoured(True, {**EVALUATED, **SAVED}),
    "metric_for_best_model": Honoured("eval_loss", EVALUATED),
    "greater_is_better": Honoured(False, {**EVALUATED, "metric_for_best_model": "eval_loss"}),
    "ignore_data_skip": Honoured(True),
    "restore_callback_states_from_checkpoint": Honoured(True),
    "full_determinism": Elsewhere("it sets the process's environment; torch's own switch, read in transformers' init"),
    "seed": Honoured(7),
    "data_seed": Honoured(7),
    "use_cpu": Honoured(True),
    "accelerator_config": Honoured({"split_batches": True}),
    "parallelism_config": Refused(ParallelismConfig(cp_size=2), "which is context parallelism"),
    "dataloader_drop_last": Honoured(True),
    "dataloader_num_workers": Honoured(1),
    "dataloader_pin_memory": Honoured(False),
    "dataloader_persistent_workers": Honoured(True, WORKERS),
    "dataloader_prefetch_factor": Honoured(2, WORKERS),
    "dataloader_multiprocessing_context": Honoured("fork", WORKERS),
    "dataloader_in_order": Honoured(False, WORKERS),
    "remove_unused_columns": Idle(True, "rows are prepared before the trainer: every column of a batch is used"),
    "label_names": Refused(["x"], "no labels"),
    "train_sampling_strategy": Honoured("sequential"),
    "length_column_name": Refused("size", "not grouped by length"),
    "ddp_find_unused_parameters": Elsewhere("tests/training/worker.py"),
    "ddp_bucket_cap_mb": Elsewhere("tests/training/worker.py"),
    "ddp_broadcast_buffers": Elsewhere("tests/training/worker.py"),
    "ddp_static_graph": Elsewhere(
        "handed to DDP as it is; it forbids what gradient accumulation does, and was not tried"
    ),
    "ddp_backend": Elsewhere("tests/training/worker.py"),
    "ddp_timeout": Elsewhere("tests/training/worker.py"),
    "fsdp": Elsewhere("tests/training/test_sharded.py"),
    "fsdp_config": Elsewhere("tests/sharding.py"),
    "deepspeed": Elsewhere("tests/training/test_sharded.py"),
    "debug": Refused("underflow_overflow", "the output of the head"),
    "skip_memory_metrics": Honoured(False),
    "do_train": Idle(True, "for scripts to read"),
    "do_eval": Idle(True, "for scripts to read"),
    "do_predict": Idle(True, "for scripts to read"),
    "resume_from_checkpoint": Elsewhere("honoured by train(): tests/training/test_surface.py"),
    "local_rank": Idle(0, "for launchers; transformers reads the environment"),
}
OF_KIND = {kind: [name for name, row in TABLE.items() if isinstance(row, kind)] for kind in (Honoured, Refused, Idle)}


def configuration(folder, **changes):
    settings = {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 1e-3, **QUIET}
    return DPOConfig(output_dir=str(folder), **{**settings, "gradient_checkpointing": False, **changes})


def train(folder, **changes):
    run = DPOTrainer(
        model=tiny_model(vocab_size=len(TOKENIZER), pad_token_id=0, bos_token_id=1, eos_token_id=2),
        args=configuration(folder, **changes),
        train_dataset=ROWS,
        eval_dataset=ROWS.select(range(4)),
        processing_class=TOKENIZER,
    )
    run.train()
    return run


def test_a_reason_that_points_at_a_test_points_at_one_that_sets_the_option():
    root, pointed = Path(__file__).parents[2], 0
    for name, row in TABLE.items():
        for path in re.findall(r"tests/[\w/]+\.py", row.reason if isinstance(row, (Elsewhere, Idle)) else ""):
            assert re.search(rf"\b{name}\b", (root / path).read_text(encoding="utf-8")), (
                f"{path} says nothing of {name}"
            )
            pointed += 1
    assert pointed > 8


def test_the_table_is_of_the_installed_version():
    assert {field.name for field in dataclasses.fields(TrainingArguments)} == TABLE.keys()


@pytest.mark.parametrize("name", OF_KIND[Refused])
def test_what_is_refused_says_why(name, tmp_path):
    row = TABLE[name]
    with pytest.raises(ConfigError, match=f"^{name} ") as caught:
        configuration(tmp_path, **{name: row.value})
    assert row.words in str(caught.value)
    configuration(tmp_path)  # and without it, all is well


@pytest.mark.parametrize("name", OF_KIND[Honoured])
def test_what_is_honoured_is_kept(name, tmp_path):
    row = TABLE[name]
    found = getattr(configuration(tmp_path, **{**row.beside, name: row.value}), name)
    assert (
        found == row.value
        or row.value in (found if isinstance(found, list) else [str(found)])
        or name
        in (
            "accelerator_config",
            "report_to",
        )
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's compiler looks at what it traces
@pytest.mark.parametrize("name", OF_KIND[Honoured])
def test_what_is_honoured_trains(name, tmp_path):
    row = TABLE[name]
    run = train(tmp_path, **{**row.beside, name: row.value})
    losses = [log["loss"] for log in run.state.log_history if "loss" in log]
    assert run.state.global_step >= 1
    assert all(map(math.isfinite, losses))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's compiler looks at what it traces
def test_a_compiled_run_is_the_same_run(tmp_path):
    """In training and in an evaluation, which traces other code. By a backend that needs no C++ compiler."""
    plain, compiled = (
        train(tmp_path / name, max_steps=2, **options)
        for name, options in (("plain", {}), ("compiled", {"torch_compile_backend": "aot_eager"}))
    )
    assert compiled.args.torch_compile
    for run in (plain, compiled):
        run.evaluate()
    names = ("loss", "grad_norm", "eval_loss", "eval_rewards/margins")
    found = [[log[name] for log in run.state.log_history for name in names if name in log] for run in (plain, compiled)]
    assert len(found[0]) == 6
    assert found[1] == pytest.approx(found[0], abs=1e-5)


@pytest.mark.parametrize("name", OF_KIND[Idle])
def test_what_is_idle_changes_no_batch_and_no_step(name, tmp_path):
    plain, changed = (dataclasses.asdict(configuration(tmp_path, **more)) for more in ({}, {name: TABLE[name].value}))
    assert {key for key in plain if plain[key] != changed[key]} <= {name}


def test_several_honoured_ones_train_together(tmp_path):
    """A selection of what the marked sweep tries one by one."""
    names = ("optim", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "data_seed", "dataloader_drop_last")
    names += ("gradient_accumulation_steps", "train_sampling_strategy", "logging_first_step", "eval_on_start")
    options = {key: value for name in names for key, value in {**TABLE[name].beside, name: TABLE[name].value}.items()}
    run = train(tmp_path, **{**options, "max_steps": 2})
    assert run.state.global_step == 2
    # Rows of an evaluation are never dropped, though there are fewer than a batch of them.
    assert next(log["eval_loss"] for log in run.state.log_history if "eval_loss" in log) == pytest.approx(math.log(2))


def test_the_newer_name_of_checkpointing_decides(tmp_path):
    """`gradient_checkpointing`, which is on by default, is its alias."""
    off = DPOConfig(output_dir=str(tmp_path), activation_checkpointing=False, use_cpu=True)
    assert (off.activation_checkpointing, off.gradient_checkpointing) == (False, False)
    on = DPOConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (on.activation_checkpointing, on.gradient_checkpointing) == (True, True)


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1", "0.5"),
        ({"optim": "adafactor", "adam_epsilon": 1e-6}, "adam_epsilon", "1e-06"),
        ({"optim_target_modules": ["q_proj"]}, "optim_target_modules", "adamw"),
        ({"optim_args": "momentum=0.9"}, "optim_args", "'momentum=0.9'"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,betas=2"}, "optim_args", "'betas=2'"),
    ],
)
def test_options_that_the_optimizer_does_not_read_are_refused(options, field, words, tmp_path):
    """Measured: with and without them the optimizer is made of the same."""
    with pytest.raises(ConfigError, match=rf"{field} .*{words}.*does not read"):
        check_before_loading(configuration(tmp_path, **options))
    used = {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"}
    for read in (used, {"adam_beta1": 0.5, "adam_epsilon": 1e-6}):
        check_before_loading(configuration(tmp_path, **read))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("per_device_train_batch_size", 0),
        ("per_device_eval_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("weight_decay", -0.1),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("learning_rate", 1e39),  # no float32
        ("adam_beta2", 1.0),
        ("num_train_epochs", math.nan),
        ("max_steps", 0),
    ],
)
def test_numbers_that_would_train_otherwise_or_fail_late_are_refused(name, value, tmp_path):
    """transformers grows weights by a decay below 0, and trains all epochs for 0 steps."""
    with pytest.raises(ConfigError, match=f"^{name} is "):
        configuration(tmp_path, **{name: value})


def test_dispatching_batches_is_refused_and_other_settings_are_not(tmp_path):
    with pytest.raises(ConfigError, match="dispatch_batches"):
        configuration(tmp_path, accelerator_config={"dispatch_batches": True})
    with pytest.raises(ConfigError, match="dispatch_batches"):
        configuration(tmp_path, accelerator_config='{"dispatch_batches": true}')
    assert configuration(tmp_path, accelerator_config={"dispatch_batches": False}) is not None


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"cp_size": 2}, "has cp_size 2, which is context parallelism: each process would get a piece of every row"),
        ({"sp_size": 2}, "has sp_size 2, which is sequence parallelism: each process would get a piece of every row"),
        (
            {"tp_size": 4},
            "has tp_size 4, which is tensor parallelism: each process would get a piece of single weights",
        ),
        (
            {"dp_replicate_size": 2, "dp_shard_size": 2},
            "has dp_replicate_size 2, dp_shard_size 2: processes that share",
        ),
        ({"dp_shard_size": 2}, "has dp_shard_size 2: processes"),
    ],
    ids=str,
)
def test_rows_that_several_processes_would_compute_together_are_refused_wherever_they_are_asked_for(
    sizes, words, tmp_path, monkeypatch
):
    """In Python, as plain values, by the launcher of accelerate, and by an accelerator that a script made before."""
    made = ParallelismConfig(**sizes)
    for given in (made, dict(sizes)):
        with pytest.raises(ConfigError, match=f"^parallelism_config {words}"):
            configuration(tmp_path, parallelism_config=given)
    with monkeypatch.context() as patch:
        patch.setitem(AcceleratorState._shared_state, "parallelism_config", made)
        with pytest.raises(ConfigError, match=f"^The Accelerator that this script made before {words}"):
            configuration(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    for name in ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size"):
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", "1")
    configuration(tmp_path)  # the launcher sets them all, 1 where nothing was asked for
    for name, size in sizes.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", str(size))
    with pytest.raises(ConfigError, match=f"^The environment .* {words}"):
        configuration(tmp_path)


def test_other_tools_for_splitting_a_model_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="parallelism_config has no size above 1"):
        configuration(tmp_path, parallelism_config=ParallelismConfig())
    for settings, what in (
        ({"tensor_parallel": {"autotp_size": 2}}, "tp_size 2, which is tensor"),
        ({"sequence_parallel_size": 2}, "sp_size 2, which is sequence"),
        ({"pipeline": {"stages": 2}}, "pp_size 2, which is pipeline"),
    ):
        written = tmp_path / "deepspeed.json"
        written.write_text(json.dumps(settings))
        for given in (settings, str(written)):
            with pytest.raises(ConfigError, match=f"^DeepSpeed's configuration has {what} parallelism"):
                configuration(tmp_path, deepspeed=given)
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(ConfigError, match="Megatron-LM"):
        configuration(tmp_path)


def test_a_model_that_would_be_cut_or_spread_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("tether.models.load.loading", lambda source: pytest.fail("weights are read"))

    def begin(**keywords):
        args = configuration(tmp_path, model_init_kwargs=keywords)
        DPOTrainer(model=str(tmp_path / "model"), args=args, train_dataset=ROWS, processing_class=TOKENIZER)

    tiny_model(vocab_size=len(TOKENIZER)).save_pretrained(tmp_path / "model")
    for name, value in (("tp_plan", "auto"), ("tp_size", 2), ("distributed_config", {"tp_size": 2})):
        with pytest.raises(ConfigError, match=f"{name} is .*with which transformers cuts weights over processes"):
            begin(**{name: value})
        with pytest.raises(ConfigError, match=f"{name} is .*with which transformers cuts"):
            load_policy(tmp_path / "model", **{name: value})
    with pytest.raises(ConfigError, match="device_map puts a part of the model on disk"):
        begin(device_map={"model": "cpu", "lm_head": "disk"})
    monkeypatch.setattr("tether.training.config.PreferenceConfig.world_size", 2)
    for spread in ("auto", {"model": "cpu", "lm_head": "cuda:0"}):
        with pytest.raises(ConfigError, match="spreads the model over several devices, and the run has 2 processes"):
            begin(device_map=spread)
    cut = tiny_model(vocab_size=len(TOKENIZER))
    cut._tp_size = 2
    with pytest.raises(ConfigError, match="weights were cut into 2 parts"):
        DPOTrainer(model=cut, args=configuration(tmp_path), train_dataset=ROWS, processing_class=TOKENIZER)


def test_what_trl_has_for_padding_is_taken_and_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="tether")
    made = configuration(tmp_path, padding_free=True, pad_to_multiple_of=8)
    assert (made.padding_free, made.pad_to_multiple_of) == (True, 8)
    said = [line for line in caplog.messages if "no effect" in line]
    assert [line.split(":")[0] for line in said] == ["padding_free", "pad_to_multiple_of"]
    with pytest.raises(ConfigError, match=r"activation_offloading is True: .*max_tokens_per_forward"):
        configuration(tmp_path, activation_offloading=True)
