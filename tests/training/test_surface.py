"""What scripts for TRL override, hand over, read and call: counted, taken, there and true, or refused by name."""

from __future__ import annotations

import ast
import inspect
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import HfArgumentParser, LlamaConfig, LlamaForSequenceClassification, TrainerCallback

import tether
from tether import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from tether.errors import ConfigError, DataError
from tether.scoring import pack, score
from tether.training import TetherTrainer
from tether.training.setup.policy import check_collator
from tether.training.step import batch_of, collate
from tether.training.surface.refused import NEVER_CALLED, REFUSED_ARGUMENTS
from tether.training.surface.retired import RETIRED
from tiny import CONFIGS, QUIET, pair_rows, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS = pair_rows(12)
SIZES = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGURATIONS = ("DPOConfig", "KTOConfig", "SFTConfig", "RewardConfig", "ORPOConfig", "CPOConfig")


def settings(folder, kind=DPOConfig, **changes):
    base = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.01, "lr_scheduler_type": "constant"}
    return kind(output_dir=str(folder), **{**base, **QUIET, "gradient_checkpointing": False, **changes})


def trainer(folder, kind=DPOTrainer, *, rows=ROWS, model=None, held_out=4, config=DPOConfig, **arguments):
    own = {name: arguments.pop(name) for name in list(arguments) if name in config.__dataclass_fields__}
    return kind(
        model=tiny_model(**SIZES) if model is None else model,
        args=settings(folder, config, **own),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:held_out]),
        **{"processing_class": TOKENIZER, **arguments},
    )


def lora():
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


# -- hooks ---------------------------------------------------------------------------------------------------------


class Tenfold(DPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        return (10 * found[0], found[1]) if return_outputs else 10 * found


@pytest.mark.sweep(1)
@pytest.mark.parametrize("tokens", [None, 60], ids=["whole", "split"])
def test_an_own_loss_trains_and_evaluates(tokens, tmp_path):
    run = trainer(tmp_path, Tenfold, held_out=5, max_tokens_per_forward=tokens, per_device_eval_batch_size=3)
    assert run.evaluate()["eval_loss"] == pytest.approx(10 * math.log(2), abs=1e-5)
    run.train()
    assert next(log["loss"] for log in run.state.log_history if "loss" in log) == pytest.approx(
        10 * math.log(2), abs=1e-5
    )
    # After training the losses of rows differ: their mean is that of the whole set, however it is split.
    found = run.evaluate()
    type(run).compute_loss, own = DPOTrainer.compute_loss, type(run).compute_loss
    try:
        assert found["eval_loss"] == pytest.approx(10 * run.evaluate()["eval_loss"], rel=1e-5)
    finally:
        type(run).compute_loss = own


def test_metrics_of_an_evaluation_are_in_no_training_log(tmp_path):
    """Evaluation goes through `compute_loss` too, which counts what a training log says."""
    logs = []
    for strategy in ("no", "steps"):
        run = trainer(tmp_path / strategy, eval_strategy=strategy, eval_steps=1, logging_steps=2)
        run.train()
        logs.append(next(log for log in run.state.log_history if "loss" in log))
    names = logs[0].keys() - {"tokens_per_second", "memory_peak_gib"}
    assert {key: logs[0][key] for key in names} == {key: logs[1][key] for key in names}


def test_an_own_loss_that_returns_something_else_is_refused(tmp_path):
    class Bare(DPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)

    with pytest.raises(ConfigError, match="it must return its loss and the LossOutput"):
        trainer(tmp_path, Bare).evaluate()


@pytest.mark.parametrize("name", sorted(NEVER_CALLED))
def test_a_method_that_is_never_called_is_refused(name, tmp_path):
    # One is there for a script to call, and no run calls it.
    assert not hasattr(DPOTrainer, name) or hasattr(transformers.Trainer, name) or name == "compute_ref_log_probs"
    own = type("Own", (DPOTrainer,), {name: lambda self, *args: None})
    below = type("Below", (own,), {})
    for kind in (own, below):
        with pytest.raises(ConfigError, match=rf"Own\.{name} would never be called.*\. "):
            kind(model="nowhere", args=None, train_dataset=[])


def test_an_order_of_prompts_of_a_subclass_is_refused():
    """Of sampled completions alone: transformers calls it where rows have no order of their own."""
    own = type("Own", (tether.GRPOTrainer,), {"_get_train_sampler": lambda self, dataset=None: None})
    with pytest.raises(ConfigError, match=r"Own\._get_train_sampler would never be called.*shuffle_dataset=False"):
        own(model="nowhere", args=None, train_dataset=[])


def test_what_is_put_on_a_trainer_from_outside_counts_or_is_refused(tmp_path, monkeypatch):
    """As a patch of a script, on one trainer or on the class, in place of a subclass."""
    run = trainer(tmp_path)
    plain = run.compute_loss

    def tenfold(model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, output = plain(model, inputs, True, num_items_in_batch)
        return (10 * loss, output) if return_outputs else 10 * loss

    run.compute_loss = tenfold
    assert run.evaluate()["eval_loss"] == pytest.approx(10 * math.log(2), abs=1e-5)
    for owner in (run, DPOTrainer):
        with monkeypatch.context() as patch:
            patch.setattr(owner, "dpo_loss", lambda *args: None, raising=False)
            with pytest.raises(ConfigError, match=r"DPOTrainer\.dpo_loss would never be called"):
                run.train()
    run.train()
    first = next(log["loss"] for log in run.state.log_history if "loss" in log)
    assert first == pytest.approx(10 * math.log(2), abs=1e-5)


def test_other_methods_of_a_subclass_are_its_own(tmp_path):
    class Fine(DPOTrainer):
        def log(self, logs, start_time=None):
            super().log({**logs, "mine": 1.0}, start_time)

        def helper(self):
            return 2

    run = trainer(tmp_path, Fine, max_steps=1)
    run.train()
    assert run.state.log_history[0]["mine"] == run.helper() - 1


def trl_methods():
    """Methods of TRL's trainers of what Tether trains, from its sources."""
    trl = Path(inspect.getsourcefile(pytest.importorskip("trl"))).parent
    names = [f"trainer/{name}" for name in ("dpo", "kto", "sft", "reward", "grpo", "rloo")]
    for name in (*names, "experimental/orpo/orpo", "experimental/cpo/cpo"):
        tree = ast.parse((trl / f"{name}_trainer.py").read_text(encoding="utf-8"))
        kinds = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Trainer")]
        yield from (item.name for kind in kinds for item in kind.body if isinstance(item, ast.FunctionDef))


def test_every_method_of_trl_is_called_here_or_refused():
    """An override of what the installed TRL's trainers call is never passed by: new names in it fail here."""
    here = {name for kind in TetherTrainer.__mro__ for name in vars(kind)}
    found = set(trl_methods())
    assert found >= {"_compute_loss", "_calculate_rewards"}
    passed_by = found - here - NEVER_CALLED.keys()
    assert passed_by <= {"_reject_skip_prepare_without_labels"}  # of a setting that is refused
    assert not (found & NEVER_CALLED.keys()) & set(vars(TetherTrainer))


# -- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(REFUSED_ARGUMENTS))
def test_an_argument_without_a_place_is_refused(name):
    with pytest.raises(ConfigError, match=f"takes no argument {name}: "):
        DPOTrainer(model="nowhere", args=None, train_dataset=[], **{name: "x"})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("beta", r"it is a field of the configuration: DPOConfig\(beta=…\)"),
        ("betta", "It takes model, ref_model, args"),
    ],
)
def test_an_option_or_a_slip_as_an_argument_is_refused(name, words):
    with pytest.raises(ConfigError, match=words):
        DPOTrainer(model="nowhere", args=None, train_dataset=[], **{name: 0.1})


def test_the_older_name_of_the_tokenizer_is_taken(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="tether")
    run = trainer(tmp_path, processing_class=None, tokenizer=TOKENIZER)
    assert run.processing_class is TOKENIZER
    assert "tokenizer: taken as processing_class" in caplog.text
    with pytest.raises(ConfigError, match="they are the same argument"):
        trainer(tmp_path, processing_class=TOKENIZER, tokenizer=tiny_tokenizer())


def test_an_optimizer_as_a_class_is_used(tmp_path):
    run = trainer(tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5}))
    run.train()
    assert isinstance(run.optimizer.optimizer, torch.optim.SGD)
    assert run.state.log_history[0]["learning_rate"] == 0.5


def test_without_a_configuration_all_is_as_it_is_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = DPOTrainer(model=tiny_model(**SIZES), train_dataset=Dataset.from_list(ROWS), processing_class=TOKENIZER)
    made = DPOConfig(output_dir="LlamaForCausalLM-DPO")
    assert (run.args.output_dir, run.args.learning_rate, run.args.beta) == (made.output_dir, 1e-6, 0.1)


def test_a_configuration_of_trl_is_told_apart(tmp_path):
    theirs = pytest.importorskip("trl").DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ConfigError, match=r"args is a trl\.DPOConfig; import DPOConfig from tether in place of trl"):
        DPOTrainer(model=tiny_model(**SIZES), args=theirs, train_dataset=ROWS, processing_class=TOKENIZER)


def test_a_collator_is_tried_on_prepared_rows(tmp_path):
    def broken(rows):
        return {"ids": torch.tensor([row["chosen_input_ids"] for row in rows])}

    with pytest.raises(ConfigError, match=r"data_collator: function fails on prepared rows \(KeyError.*prompt_ids"):
        trainer(tmp_path, data_collator=broken)
    check_collator(collate, trainer(tmp_path).train_dataset)


def test_compute_metrics_gets_the_numbers_of_every_row(tmp_path):
    """Held to plain scoring of the rows, before and after training."""
    seen = []
    run = trainer(
        tmp_path,
        held_out=5,
        compute_metrics=lambda found: seen.append(found) or {"mean": float(found.predictions["chosen_rewards"].mean())},
        per_device_eval_batch_size=2,
    )
    start = score(run.policy, pack(run.run.source.probe(12))).logps
    assert len(start) == 24
    run.evaluate()
    assert np.all(seen[0].predictions["chosen_rewards"] == 0.0)
    run.train()
    metrics = run.evaluate()
    found = seen[-1].predictions
    batch = batch_of(collate([run.eval_dataset[i] for i in range(5)]))
    with torch.no_grad():
        logps = score(run.policy, batch).logps.detach().numpy()
    reference = run.run.reference.score(batch).logps.numpy()
    np.testing.assert_allclose(found["chosen_logps"], logps[0::2], atol=1e-4)
    np.testing.assert_allclose(found["rejected_logps"], logps[1::2], atol=1e-4)
    np.testing.assert_allclose(found["reference_rejected_logps"], reference[1::2], atol=1e-4)
    np.testing.assert_allclose(found["chosen_rewards"], 0.1 * (logps - reference)[0::2], atol=1e-4)
    assert metrics["eval_mean"] == pytest.approx(metrics["eval_rewards/chosen"], abs=1e-5)
    assert seen[-1].label_ids.tolist() == [0] * 5


def test_compute_metrics_of_single_completions_and_of_rewards(tmp_path):
    seen = []
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 > 0} for i, row in enumerate(ROWS)]
    keep = {"compute_metrics": lambda found: seen.append(found) or {}}
    trainer(tmp_path, KTOTrainer, rows=rows, config=KTOConfig, held_out=6, **keep).evaluate()
    assert seen[0].label_ids.tolist() == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert seen[0].predictions["logps"].shape == (6,)
    assert np.all(seen[0].predictions["rewards"] == 0.0)
    model = LlamaForSequenceClassification(LlamaConfig(**{**CONFIGS["llama"][1], **SIZES}, num_labels=1))
    run = trainer(tmp_path / "reward", RewardTrainer, model=model, config=RewardConfig, held_out=3, **keep)
    gap = run.evaluate()["eval_margin"]
    found = seen[1].predictions
    assert (found["chosen_rewards"] - found["rejected_rewards"]).mean() == pytest.approx(gap, abs=1e-5)
    with pytest.raises(ConfigError, match="must return a dictionary"):
        trainer(tmp_path / "list", compute_metrics=lambda found: [1]).evaluate()


# -- members -------------------------------------------------------------------------------------------------------


def test_members_say_what_is_true(tmp_path):
    run = trainer(tmp_path)
    assert (run.ref_model, run.is_peft_model, run.aux_loss_enabled, run.ref_adapter_name) == (None, False, False, None)
    assert (run.beta, run.loss_type) == (0.1, ["sigmoid"])
    assert run.policy.model_tags == ["tether", "dpo"]
    other = tiny_model(seed=3, **SIZES)
    run = trainer(tmp_path / "other", ref_model=other, peft_config=lora())
    assert (run.ref_model, run.is_peft_model) == (other, True)


def test_log_probs_of_the_reference_are_those_of_plain_scoring(tmp_path):
    other = tiny_model(seed=3, **SIZES)
    run = trainer(tmp_path, ref_model=other)
    inputs = next(iter(run.get_eval_dataloader()))
    chosen, rejected = run.compute_ref_log_probs(inputs)
    with torch.no_grad():
        found = score(other, batch_of(inputs)).logps
    torch.testing.assert_close(torch.stack([chosen, rejected], 1).flatten(), found, atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match="has no reference"):
        trainer(tmp_path / "none", loss_type="sft").compute_ref_log_probs(inputs)


def test_the_card_names_data_base_and_reference(tmp_path):
    run = trainer(tmp_path, peft_config=lora())
    run.train()
    run.policy.base_model.model.config.name_or_path = "someone/base"
    run.create_model_card(dataset_name="someone/pairs", tags=["mine"], license="mit")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == ["someone/pairs"]
    assert (card.data.base_model, card.data.library_name, card.data.license) == ("someone/base", "peft", "mit")
    assert card.data.tags == ["generated_from_trainer", "mine", "tether", "dpo"]
    assert "2 steps" in card.text
    assert "reference: start" in card.text
    run.create_model_card("its name")
    assert ModelCard.load(tmp_path / "README.md").data.model_name == "its name"


def test_the_card_names_no_folder_of_this_machine(tmp_path):
    run = trainer(tmp_path)
    run.policy.config.name_or_path = str(tmp_path)
    run.create_model_card()
    assert str(tmp_path) not in (tmp_path / "README.md").read_text()


def test_pushing_passes_the_name_of_the_data_on(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    hub = SimpleNamespace(upload_folder=lambda **keywords: keywords["folder_path"])
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda *_: hub)
    run.hub_model_id = "someone/model"
    monkeypatch.setattr(run, "save_model", lambda *args, **keywords: None)
    assert run.push_to_hub(dataset_name="someone/pairs") == str(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.datasets, card.data.tags[1:]) == (["someone/pairs"], ["tether", "dpo"])


def test_what_is_not_offered_says_what_to_do(tmp_path):
    run = trainer(tmp_path)
    with pytest.raises(ConfigError, match=r"Use evaluate\(rows\)"):
        run.predict(ROWS)
    with pytest.raises(ConfigError, match="Make a trainer for each trial"):
        run.hyperparameter_search()


@pytest.mark.parametrize("name", ["LogCompletionsCallback", "SyncRefModelCallback", "BEMACallback"])
def test_callbacks_of_trl_that_cannot_work_are_refused(name, tmp_path):
    theirs = getattr(pytest.importorskip("trl"), name)
    made = theirs.__new__(theirs)
    with pytest.raises(ConfigError, match=f"TRL's {name} cannot work here"):
        trainer(tmp_path, callbacks=[made])
    run = trainer(tmp_path)
    with pytest.raises(ConfigError, match=f"TRL's {name} cannot work here"):
        run.add_callback(made)
    run.add_callback(type(name, (TrainerCallback,), {})())  # one of the user's own with that name is fine


# -- beginning again -----------------------------------------------------------------------------------------------


class Full(DPOTrainer):
    """Memory ends at the third forward."""

    calls = 0

    def compute_loss(self, *args, **keywords):
        type(self).calls += 1
        if type(self).calls == 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().compute_loss(*args, **keywords)


def test_a_run_that_begins_again_is_the_run_that_never_stopped(tmp_path, caplog):
    """The same losses and weights: weights and optimizer are those of the start, and so is the batch of a step."""
    results = []
    for folder, kind in (("whole", DPOTrainer), ("again", type("Once", (Full,), {"calls": 0}))):
        run = trainer(tmp_path / folder, kind, auto_find_batch_size=True, max_steps=4, peft_config=lora())
        run.train()
        losses = [log["loss"] for log in run.state.log_history if "loss" in log]
        results.append((losses, {name: p.detach() for name, p in run.policy.named_parameters() if p.requires_grad}))
    assert "memory: full; begun again from the start with at most 2,048 tokens a forward" in caplog.text
    assert len(results[0][0]) == 4
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-6)
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, atol=1e-6, rtol=0)
    steps = [json.loads(line)["step"] for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


@pytest.mark.slow
def test_a_batch_that_must_stay_whole_gets_smaller(tmp_path):
    kind = type("Coupled", (Full,), {"calls": 0})
    run = trainer(tmp_path, kind, auto_find_batch_size=True, loss_type="aot", max_steps=3)
    run.train()
    assert run.state.global_step == 3
    assert run.state.train_batch_size == 3


def test_what_could_not_begin_again_is_refused(tmp_path):
    sgd = torch.optim.SGD(tiny_model(**SIZES).parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="auto_find_batch_size is True, and an optimizer was given"):
        trainer(tmp_path, auto_find_batch_size=True, optimizers=(sgd, None))


# -- names and parsers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_command_line_makes_the_configuration_that_python_makes(name, tmp_path):
    kind = getattr(tether, name)
    (found,) = HfArgumentParser([kind]).parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu"])
    made = kind(output_dir=str(tmp_path), use_cpu=True)
    assert {key: getattr(found, key) for key in kind.__dataclass_fields__} == {
        key: getattr(made, key) for key in kind.__dataclass_fields__
    }


def test_flags_of_trls_documentation_are_parsed(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--no_remove_unused_columns", "--loss_type", "sigmoid", "sft"]
    (found,) = HfArgumentParser([DPOConfig]).parse_args_into_dataclasses([*flags, "--loss_weights", "1", "0.5"])
    assert (found.remove_unused_columns, found.loss_type, found.loss_weights) == (False, ["sigmoid", "sft"], [1.0, 0.5])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_option_of_tethers_own_clashes_with_trls_other_arguments(name):
    trl = pytest.importorskip("trl")
    others = {field for kind in (trl.ScriptArguments, trl.ModelConfig) for field in kind.__dataclass_fields__}
    others |= set(trl.DatasetMixtureConfig.__dataclass_fields__)
    assert not others & getattr(tether, name).__dataclass_fields__.keys()


OF_TRL = ("DPO", "KTO", "SFT", "Reward", "ORPO", "CPO", "GRPO", "RLOO")


@pytest.mark.parametrize("name", [f"{name}Config" for name in OF_TRL])
def test_every_option_of_trl_is_taken(name, tmp_path):
    """At TRL's own default: scripts write many of them out."""
    module = {"ORPOConfig": "trl.experimental.orpo", "CPOConfig": "trl.experimental.cpo"}.get(name, "trl")
    theirs = getattr(pytest.importorskip(module), name)(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    kind = getattr(tether, name)
    unknown = theirs.__dataclass_fields__.keys() - kind.__dataclass_fields__.keys() - RETIRED.keys()
    assert unknown == set()
    for field in theirs.__dataclass_fields__.keys() - transformers.TrainingArguments.__dataclass_fields__.keys():
        kind(output_dir=str(tmp_path), use_cpu=True, **{field: getattr(theirs, field)})


@pytest.mark.parametrize("name", [f"{name}Trainer" for name in OF_TRL])
def test_every_argument_of_trl_s_trainers_has_a_place_or_a_reason(name):
    module = {"ORPOTrainer": "trl.experimental.orpo", "CPOTrainer": "trl.experimental.cpo"}.get(name, "trl")
    theirs = inspect.signature(getattr(pytest.importorskip(module), name).__init__).parameters
    ours = [one for kind in getattr(tether, name).__mro__ for one in inspect.signature(kind.__init__).parameters]
    assert len(theirs) > 8
    assert theirs.keys() - REFUSED_ARGUMENTS.keys() <= set(ours)


@pytest.mark.parametrize("name", sorted(RETIRED))
def test_a_retired_name_is_taken_or_refused(name, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="tether")
    old = RETIRED[name]
    values = {"loss_type": "sigmoid", "beta": 0.2, "use_cpu": True, "hub_token": "x", "torch_compile_backend": None}
    values |= {"eval_strategy": "no", "warmup_steps": 0.1, "max_length": 64, "reference_adapter": "x"}
    values |= {"ref_model_init_kwargs": {"dtype": "float32"}, "hub_model_id": "a/b"}
    if old.becomes is not None:
        value = values.get(old.becomes, 2)
        kind = DPOConfig if old.becomes in DPOConfig.__dataclass_fields__ else tether.OnlineDPOConfig
        assert getattr(kind(output_dir=str(tmp_path), **{name: value}), old.becomes) == value
        assert f"{name}: taken as {old.becomes}" in caplog.text
        with pytest.raises(ConfigError, match=f"{name} is the older name of {old.becomes}, which was given too"):
            kind(output_dir=str(tmp_path), **{name: value, old.becomes: value})
    elif old.advice:
        DPOConfig(output_dir=str(tmp_path), **{name: old.harmless})
        with pytest.raises(ConfigError, match=f"^{name} is 'something', and there is no such option any more: "):
            DPOConfig(output_dir=str(tmp_path), **{name: "something"})
    else:
        DPOConfig(output_dir=str(tmp_path), **{name: "anything"})
        assert f"{name}: has no effect any more" in caplog.text


def test_a_misspelt_option_is_still_an_error(tmp_path):
    with pytest.raises(TypeError, match="betta"):
        DPOConfig(output_dir=str(tmp_path), betta=0.1)


# -- what is announced ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["margin", "weight"])
def test_columns_that_change_the_loss_are_announced(name, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="tether")
    rows = [{**row, name: 1.0 + i % 2} for i, row in enumerate(ROWS)]
    trainer(tmp_path, rows=rows)
    line = next(line for line in caplog.messages if line.startswith("column"))
    assert line.startswith(f"column `{name}`: used; it ")
    assert "from 1 to 2, mean 1.5" in line
    # Of held-out rows too, whose loss it changes as well.
    assert any(line.startswith(f"eval: column `{name}`: used; it ") for line in caplog.messages)
    caplog.clear()
    trainer(tmp_path / "without")
    assert not any(line.startswith("column") for line in caplog.messages)


def test_rows_of_which_none_counts_are_refused(tmp_path):
    """The first step blamed the weights' type for what it could not change."""
    with pytest.raises(DataError, match="train: every row has the weight 0, so that none of them counts"):
        trainer(tmp_path, rows=[{**row, "weight": 0} for row in ROWS])
    trainer(tmp_path / "some", rows=[{**row, "weight": i % 2} for i, row in enumerate(ROWS)])


def test_an_evaluation_without_rows_is_refused(tmp_path):
    run = trainer(tmp_path)
    with pytest.raises(DataError, match="has no rows"):
        run.evaluate(run.eval_dataset.select([]))


def test_a_checkpoint_in_the_configuration_is_resumed_from(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1)
    run.train()
    again = trainer(tmp_path, max_steps=3, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again.train()
    assert [log["step"] for log in again.state.log_history if "loss" in log] == [1, 2, 3]


# -- processes -----------------------------------------------------------------------------------------------------

_ALONE = """
import os
import pathlib
from tether.training import DPOConfig
args = DPOConfig(output_dir="x", ddp_backend="gloo")
pathlib.Path(__file__).with_name(os.environ["RANK"]).write_text(str(args.world_size))
"""


@pytest.mark.multiprocess
@pytest.mark.slow
def test_processes_of_a_launcher_on_cpus_are_one_run(tmp_path):
    """Without `use_cpu`, which transformers would want said."""
    script = tmp_path / "script.py"
    script.write_text(_ALONE, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = subprocess.run([*launcher, str(script)], capture_output=True, text=True, check=False, timeout=300)
    assert found.returncode == 0, found.stderr
    # A file of each process: what two of them print can meet on one line.
    assert [(tmp_path / rank).read_text(encoding="utf-8") for rank in ("0", "1")] == ["2", "2"]


@pytest.mark.parametrize(
    "name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "FLUX_JOB_SIZE", "JSM_NAMESPACE_SIZE"]
)
def test_processes_that_are_not_one_run_are_refused(name, tmp_path, monkeypatch):
    args = settings(tmp_path)
    assert args.world_size == 1
    monkeypatch.setenv(name, "2")
    with pytest.raises(ConfigError, match=rf"2 processes were started \({name}\), and each would be a run of its own"):
        DPOTrainer(model="nowhere", args=args, train_dataset=ROWS)
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match="nowhere"):
        DPOTrainer(model="nowhere", args=args, train_dataset=ROWS)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 .* no variable such as RANK .* not started by a launcher. Unset"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE is 2 .* not started by a launcher"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE is 'two' .* not a whole number"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is '' .* not a whole number"),
        ({"MASTER_PORT": "tcp://10.0.0.1:29500"}, "MASTER_PORT is 'tcp:.* not a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0' .* the least that a launcher sets is 1"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost"}, "RANK is 2 .* the last one is 1"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE is 2 and RANK is 1 .* MASTER_ADDR, where the processes meet"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE is 2 .* MASTER_ADDR"),
        ({"RANK": "1"}, "RANK is 1 .* no variable such as WORLD_SIZE says how many: each would be a run of its own"),
        ({"PMIX_RANK": "3"}, "PMIX_RANK is 3 .* other processes were started"),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, "LOCAL_RANK is 0 .* MASTER_ADDR, .* not set. Unset"),
    ],
)
def test_a_number_of_processes_that_no_launcher_set_is_told_as_that(variables, message, tmp_path, monkeypatch):
    """accelerate's own error is of an address, and it would wait for processes that do not exist."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path)


def test_supervised_rows_of_a_function_are_its_texts(tmp_path):
    """TRL's `formatting_func`."""
    rows = [{"question": row["prompt"], "answer": row["chosen"]} for row in ROWS]
    texts = [{"text": f"{row['question']} {row['answer']}"} for row in rows]
    found = []
    for data, more in ((texts, {}), (rows, {"formatting_func": lambda row: f"{row['question']} {row['answer']}"})):
        folder = tmp_path / str(len(found))
        run = trainer(folder, SFTTrainer, rows=data, config=SFTConfig, disable_dropout=True, **more)
        run.train()
        found.append([log["loss"] for log in run.state.log_history if "loss" in log])
    assert found[0] == found[1]
