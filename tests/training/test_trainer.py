"""The trainer's laws: guards, records, resumption, and one gradient for every split of a step."""

from __future__ import annotations

import gc
import json
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptEncoderConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from tether import DPOConfig, DPOTrainer
from tether.errors import ConfigError, DataError, ReferencePolicyError, TetherError
from tether.training.algorithms.base import Algorithm
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer

ROWS = pair_rows(12)
TOKENIZER = tiny_tokenizer()


def policy(seed=0, **changes):
    return tiny_model(seed=seed, vocab_size=len(TOKENIZER), pad_token_id=0, bos_token_id=1, eos_token_id=2, **changes)


def lora(**changes):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def config(folder, **changes):
    return DPOConfig(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            **QUIET,
            "gradient_checkpointing": False,
            **changes,
        },
    )


def trainer(folder, model=None, *, rows=ROWS, **arguments):
    settings = {name: arguments.pop(name) for name in list(arguments) if name in DPOConfig.__dataclass_fields__}
    return DPOTrainer(
        model=policy() if model is None else model,
        args=config(folder, **settings),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        processing_class=TOKENIZER,
        **arguments,
    )


def weights(run):
    return {name: tensor.detach().clone() for name, tensor in run.policy.named_parameters() if tensor.requires_grad}


def step_logs(run, name="loss"):
    return [log[name] for log in run.state.log_history if "loss" in log]


@pytest.mark.parametrize("adapter", [None, lora()], ids=["full", "lora"])
def test_step_one_starts_at_ln_2(adapter, tmp_path):
    """INV-1, 6: loss ln 2 and rewards exactly 0 before the first update, also for weights edited in memory."""
    model = policy()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    run = trainer(tmp_path, model, peft_config=adapter, learning_rate=1e-3)
    run.train()
    assert step_logs(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert step_logs(run, "rewards/margins")[0] == 0.0
    assert step_logs(run)[-1] < math.log(2)
    assert run.guard.passed
    assert run.guard.max_difference == 0.0


@pytest.mark.parametrize("adapter", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("splits", [(4, 2), (2, 4), (1, 8)])
@pytest.mark.sweep(1)
def test_one_gradient_for_every_split_of_a_step(splits, adapter, tmp_path):
    """INV-25: 8 x 1 equals 4 x 2, 2 x 4 and 1 x 8, with uneven lengths and a last step that is not full."""
    size, accumulation = splits
    settings = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "num_train_epochs": 2,
        "max_steps": -1,
        "lr_scheduler_type": "constant",
    }

    def weights_after(size, accumulation):
        torch.manual_seed(0)
        run = trainer(
            tmp_path,
            policy(),
            peft_config=adapter,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            **settings,
        )
        run.train()
        return weights(run), [log["loss"] for log in run.state.log_history if "loss" in log]

    whole, whole_losses = weights_after(8, 1)
    split, split_losses = weights_after(size, accumulation)
    assert split_losses == pytest.approx(whole_losses, abs=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, atol=1e-5, rtol=1e-4)


def test_metrics_are_means_over_rows(tmp_path):
    """INV-26: the same evaluation for every batch size, the last batch smaller than the others."""
    found = []
    for size in (1, 3, 5, 12):
        run = trainer(
            tmp_path,
            policy(),
            ref_model=policy(seed=1),
            eval_dataset=Dataset.from_list(ROWS),
            per_device_eval_batch_size=size,
        )
        metrics = run.evaluate()
        found.append(
            {name: value for name, value in metrics.items() if "/" in name or name in ("eval_loss", "eval_entropy")}
        )
    assert "eval_rewards/margins" in found[0]
    assert "eval_loss" in found[0]
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-5)


def test_what_a_run_looks_at_on_the_way_changes_no_dropout(tmp_path):
    """An evaluation after each step, a check of the reference after each: the weights are those of a run without."""

    def weights(name, seed=0, **settings):
        torch.manual_seed(seed)
        adapter = lora(lora_dropout=0.3)
        settings = {"max_steps": 3, "learning_rate": 0.01, "disable_dropout": False, **settings}
        one = trainer(tmp_path / name, policy(), eval_dataset=ROWS[:4], peft_config=adapter, **settings)
        torch.manual_seed(seed)
        one.train()
        return torch.cat([tensor.detach().flatten() for tensor in one.model.parameters() if tensor.requires_grad])

    expected = weights("plain")
    looked = weights("looked", eval_strategy="steps", eval_steps=1, reference_check_steps=1)
    assert torch.equal(looked, expected)
    assert not torch.equal(weights("other draws", seed=1), expected)  # negative control: dropout is on


@pytest.mark.parametrize("kind", ["lora", "full", "continued adapter", "another model"])
@pytest.mark.sweep(1)
def test_a_resumed_run_is_the_run_that_was_not_stopped(kind, tmp_path):
    """INV-7: train(6) equals train(3), a new process' worth of objects, resume(3): exactly."""

    def build():
        torch.manual_seed(5)
        model, arguments = policy(), {}
        if kind == "lora":
            arguments["peft_config"] = lora()
        if kind == "continued adapter":
            model = get_peft_model(model, lora())
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
        if kind == "another model":
            arguments["ref_model"] = policy(seed=1)
        return model, arguments

    def run(folder, resume=None, **settings):
        model, arguments = build()
        one = trainer(folder, model, max_steps=6, save_strategy="steps", save_steps=3, **arguments, **settings)
        one.train(resume_from_checkpoint=resume)
        return one

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert step_logs(resumed) == step_logs(whole)
    assert resumed.guard == whole.guard
    for name in ("rewards/margins", "logps/chosen", "num_tokens"):
        assert step_logs(resumed, name)[-3:] == step_logs(whole, name)[-3:]
    other = weights(resumed)
    assert all(torch.equal(value, other[name]) for name, value in weights(whole).items())


def test_the_snapshot_of_a_resumed_run_comes_from_its_checkpoint(tmp_path):
    """INV-8: a randomly initialised adapter is another one in the next process; the checkpoint holds the start."""

    def run(folder, seed, **arguments):
        model = policy()
        torch.manual_seed(seed)
        return trainer(
            folder,
            get_peft_model(model, lora(init_lora_weights=False)),
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            **arguments,
        )

    first = run(tmp_path, 1)
    probe = first.run.reference.score(first.run.probe).token_logps
    first.train()
    second = run(tmp_path, 2)
    assert not torch.allclose(second.run.reference.score(second.run.probe).token_logps, probe, atol=1e-3)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(second.run.reference.score(second.run.probe).token_logps, probe)
    assert second.run.reference.identity == first.run.reference.identity


def test_resuming_with_another_reference_is_refused(tmp_path):
    """INV-8: both identities are in the message."""
    first = trainer(tmp_path, ref_model=policy(seed=1), max_steps=2, save_strategy="steps", save_steps=1)
    first.train()
    second = trainer(tmp_path, ref_model=policy(seed=2), max_steps=3)
    with pytest.raises(ReferencePolicyError, match="another reference") as error:
        second.train(resume_from_checkpoint=True)
    for run in (first, second):
        assert run.run.reference.identity.fingerprint in str(error.value)


def test_a_trained_folder_as_the_model_is_never_a_silent_start(tmp_path):
    """INV-8: it asks, and takes an explicit answer."""
    run = trainer(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    run.train()
    folder = tmp_path / "run" / "checkpoint-1"
    TOKENIZER.save_pretrained(folder)
    with pytest.raises(ConfigError, match="Say what this run is tethered to"):
        trainer(tmp_path / "next", str(folder))
    assert trainer(tmp_path / "next", str(folder), reference="start").run.reference.identity.meaning == "start"


def test_records_in_the_run_folder(tmp_path):
    """INV-3: what the reference is, and that it was proved, is on disk; so is what was done to the data."""
    run = trainer(
        tmp_path, peft_config=lora(), save_strategy="steps", save_steps=2, eval_dataset=Dataset.from_list(ROWS[:3])
    )
    run.train()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        record = json.loads((folder / "reference.json").read_text())
        assert record["identity"] == run.run.reference.identity.to_dict()
        assert record["guard"]["passed"] is True
        assert "adapter_off" in record["line"]
    assert json.loads((tmp_path / "data.json").read_text())["train"]["rows"] == len(ROWS)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


class Meddle(TrainerCallback):
    """Edits a frozen tensor in the middle of the run."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            with torch.no_grad():
                base.model.embed_tokens.weight.add_(0.1)


def test_a_moved_reference_stops_the_run(tmp_path):
    """INV-2: checked cheaply during the run."""
    run = trainer(tmp_path, peft_config=lora(), reference_check_steps=1, callbacks=[Meddle()])
    with pytest.raises(ReferencePolicyError, match="The reference moved: at step 2"):
        run.train()


def test_weights_edited_after_the_trainer_was_made_are_refused(tmp_path):
    """INV-1: the guard runs on real rows before the first update."""
    model = policy()
    run = trainer(tmp_path, model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    before = weights(run)
    with pytest.raises(ReferencePolicyError, match="The policy is not at its reference"):
        run.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(run).items())


@pytest.mark.parametrize("meaning", ["start", "base", "model"])
def test_a_reference_edited_after_the_trainer_was_made_is_refused(meaning, tmp_path):
    """INV-2: an edited base moves a policy and the reference under its adapter alike, and no comparison of the two
    shows it."""
    given = {"ref_model": policy(seed=1)} if meaning == "model" else {"peft_config": lora(), "reference": meaning}
    run = trainer(tmp_path, **given)
    edited = run.policy.get_base_model() if meaning != "model" else given["ref_model"]
    with torch.no_grad():
        edited.model.embed_tokens.weight.add_(0.1)
    with pytest.raises(ReferencePolicyError, match="The reference moved: before the first step"):
        run.train()


def test_what_is_put_in_the_place_of_model_or_rows_later_is_told_as_that(tmp_path):
    run = trainer(tmp_path / "rows", eval_dataset=Dataset.from_list(ROWS[:4]))
    run.eval_dataset = Dataset.from_list(ROWS[4:8])
    with pytest.raises(DataError, match=r"columns prompt, chosen, rejected was not prepared.*evaluate\(rows\)"):
        run.evaluate()
    run.train_dataset = Dataset.from_list(ROWS)
    with pytest.raises(DataError, match="was not prepared"):
        run.train()
    run = trainer(tmp_path / "model")
    run.policy.resize_token_embeddings(len(TOKENIZER) + 8)
    with pytest.raises(ReferencePolicyError, match="Resize the model before the trainer is made"):
        run.train()


def test_nothing_to_train_is_an_error(tmp_path):
    """INV-5."""
    with pytest.raises(ReferencePolicyError, match="Nothing would train"):
        trainer(tmp_path, policy().requires_grad_(False))


def test_an_optimizer_of_another_model_is_an_error(tmp_path):
    """INV-5."""
    optimizer = torch.optim.SGD(policy().parameters(), lr=0.1)
    with pytest.raises(ReferencePolicyError, match="The optimizer holds none"):
        trainer(tmp_path, optimizers=(optimizer, None)).train()


def test_steps_that_change_nothing_are_an_error(tmp_path):
    """INV-5: updates below the resolution of the weights' dtype."""
    model = policy().to(torch.bfloat16)
    with pytest.raises(ReferencePolicyError, match="No trainable tensor changed in step 1"):
        trainer(tmp_path, model, optim="sgd", learning_rate=1e-12).train()


def test_a_warm_up_from_zero_is_no_error(tmp_path):
    """INV-5: the first step of a warm-up has a learning rate of 0; the check waits for the second."""
    trainer(tmp_path, lr_scheduler_type="linear", warmup_steps=2).train()


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    """INV-28."""
    with pytest.raises(TetherError, match=r"The loss of step 2 is not a number. The update was not made"):
        trainer(tmp_path, optim="sgd", learning_rate=1e30, max_grad_norm=0.0).train()


def test_no_reference_runs_no_reference(tmp_path, monkeypatch):
    """INV-9: one scoring call per micro-batch, where a reference makes two."""
    calls = []
    original = Algorithm.scoring

    def counting(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(Algorithm, "scoring", staticmethod(counting))
    run = trainer(tmp_path, reference="none", max_steps=2)
    calls.clear()
    run.train()
    assert len(calls) == 2
    run = trainer(tmp_path, max_steps=2, reference_check_steps=0)
    calls.clear()
    run.train()
    assert len(calls) == 4 + 3  # two steps with a reference, and the guards before the first


@pytest.mark.sweep(1)
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_layouts_train_alike(layout, tmp_path):
    """INV-19: the same run on every layout."""
    run = trainer(tmp_path, scoring_layout=layout, optim="sgd", ref_model=policy(seed=1))
    run.train()
    assert run.run.layout == layout
    expected = trainer(tmp_path, optim="sgd", ref_model=policy(seed=1))
    expected.train()
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(run)[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_gradient_checkpointing_trains_alike(tmp_path):
    """INV-21: LoRA with checkpointing gives the gradients that LoRA without gives."""
    runs = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        run = trainer(
            tmp_path, peft_config=lora(), gradient_checkpointing=checkpointing, optim="sgd", learning_rate=0.5
        )
        run.train()
        runs.append(weights(run))
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, atol=1e-6, rtol=1e-4)


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("name", "value"), [("beta", 0.5), ("label_smoothing", 0.2), ("max_length", 20), ("truncation_mode", "keep_end")]
)
def test_options_take_effect(name, value, tmp_path):
    """INV-24: on a fixed batch the number changes."""
    evaluation = []
    for settings in ({"max_length": 22}, {"max_length": 22, name: value}):
        run = trainer(tmp_path, ref_model=policy(seed=1), eval_dataset=Dataset.from_list(ROWS), **settings)
        evaluation.append(run.evaluate()["eval_loss"])
    assert evaluation[0] != pytest.approx(evaluation[1], abs=1e-4)


def test_training_rows_inside_the_evaluation_set_are_counted(tmp_path, caplog):
    """INV-35."""
    run = trainer(tmp_path, eval_dataset=Dataset.from_list(ROWS[:3]))
    assert run.run.data.reports["eval"]["overlap"] == {"rows": 3, "prompts": 3, "train_rows": len(ROWS)}
    assert "3 of 12 training rows are in this evaluation set" in caplog.text


@pytest.mark.sweep(1)
@pytest.mark.parametrize("method", ["snapshot", "model"])
@pytest.mark.parametrize("name", ["start", "another"])
def test_mixed_precision_is_the_same_for_policy_and_reference(name, method, tmp_path):
    """INV-1, 10: in bfloat16 a copy of the policy as its reference gives exactly zero margins."""
    arguments = {"reference": "start", "reference_method": method} if name == "start" else {"ref_model": policy()}
    run = trainer(tmp_path, bf16=True, eval_dataset=Dataset.from_list(ROWS), max_steps=1, **arguments)
    before = run.evaluate()
    assert before["eval_rewards/margins"] == 0.0
    run.train()
    assert step_logs(run, "rewards/margins")[0] == 0.0
    exact = trainer(tmp_path, eval_dataset=Dataset.from_list(ROWS)).evaluate()
    assert before["eval_logps/chosen"] != exact["eval_logps/chosen"], "bfloat16 takes effect before training too"
    assert before["eval_logps/chosen"] == pytest.approx(exact["eval_logps/chosen"], rel=1e-2)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("tied", [False, True])
def test_the_reference_survives_evaluation_generation_saving_and_loading(tied, tmp_path):
    """INV-2: the same log-probs of a fixed probe, to the bit, with tied and untied embeddings."""
    run = trainer(
        tmp_path,
        policy(tie_word_embeddings=tied),
        eval_dataset=Dataset.from_list(ROWS),
        save_strategy="steps",
        save_steps=2,
    )
    probe = run.run.reference.score(run.run.probe).token_logps
    run.train()
    run.evaluate()
    run.policy.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert torch.equal(run.run.reference.score(run.run.probe).token_logps, probe)
    resumed = trainer(tmp_path, policy(tie_word_embeddings=tied), max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert torch.equal(resumed.run.reference.score(resumed.run.probe).token_logps, probe)


def test_a_revision_is_recorded(tmp_path):
    """INV-6: the commit that a model was loaded from is part of its identity."""
    model = policy()
    model.config._commit_hash = "0123abc"
    assert trainer(tmp_path, model).run.reference.identity.revision == "0123abc"


@pytest.mark.parametrize("family", ["opt", "falcon"])
def test_randomness_outside_dropout_modules_is_disabled_too(family, tmp_path):
    """INV-21: layer drop and rates that a forward reads from attributes or the configuration."""
    from transformers import FalconConfig, FalconForCausalLM, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "opt":
        model = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32, layerdrop=0.5, dropout=0.3))
    else:
        model = FalconForCausalLM(FalconConfig(**sizes, hidden_dropout=0.5, attention_dropout=0.3))
    run = trainer(tmp_path, model)
    model.train()
    with torch.no_grad():
        first, second = (run.run.scorer(model, run.run.probe).token_logps for _ in range(2))
    assert torch.equal(first, second)


def test_an_interrupted_evaluation_leaves_nothing_behind(tmp_path):
    class Interrupt(TrainerCallback):
        armed = True

        def on_prediction_step(self, args, state, control, **kwargs):
            if self.armed:
                raise KeyboardInterrupt

    interrupt = Interrupt()
    run = trainer(tmp_path, ref_model=policy(seed=1), eval_dataset=Dataset.from_list(ROWS), callbacks=[interrupt])
    with pytest.raises(KeyboardInterrupt):
        run.evaluate()
    interrupt.armed = False
    assert run.evaluate()["eval_loss"] == pytest.approx(run.evaluate()["eval_loss"], abs=1e-7)


def test_metrics_survive_a_torn_line_and_an_evaluation_before_training(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first = trainer(tmp_path, eval_dataset=Dataset.from_list(ROWS), **settings)
    first.evaluate()
    first.train()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "lo')
    trainer(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert lines[0]["step"] == 0
    assert "eval_loss" in lines[0]


def test_steps_that_a_gradient_scaler_skips_are_no_error(tmp_path, monkeypatch):
    """In float16 the first steps are often skipped until the scale is right."""
    from accelerate.optimizer import AcceleratedOptimizer

    skips = iter([True, True])
    original = AcceleratedOptimizer.step

    def step(self, closure=None):
        self._skipped = next(skips, False)
        if not self._skipped:
            original(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", step)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda self: self._skipped))
    trainer(tmp_path).train()


def test_dropout_is_off_unless_asked_for(tmp_path):
    """INV-21."""
    for disable, expected in ((True, 0.0), (False, 0.5)):
        run = trainer(tmp_path, peft_config=lora(lora_dropout=0.5), disable_dropout=disable)
        rates = {module.p for module in run.policy.modules() if isinstance(module, torch.nn.Dropout)}
        assert rates == {expected}


def test_new_rows_are_evaluated_after_training(tmp_path):
    """INV-15: rows that were not there when the run began, and several sets."""
    run = trainer(tmp_path, eval_dataset={"a": Dataset.from_list(ROWS[:3]), "b": Dataset.from_list(ROWS[3:])})
    run.train()
    both = run.evaluate()
    assert {"eval_a_loss", "eval_b_loss"} <= both.keys()
    assert run.evaluate(Dataset.from_list(ROWS[:3]))["eval_loss"] == pytest.approx(both["eval_a_loss"], abs=1e-6)
    # A mapping that names a source is one set, and not sets by the names of its keys.
    Dataset.from_list(ROWS[:3]).to_json(tmp_path / "rows.jsonl")
    named = run.evaluate({"path": str(tmp_path / "rows.jsonl")})
    assert named["eval_loss"] == pytest.approx(both["eval_a_loss"], abs=1e-6)


def test_the_saved_adapter_scores_as_the_model_in_memory(tmp_path):
    """INV-38: reloaded in plain transformers and peft."""
    model = policy()
    model.save_pretrained(tmp_path / "base")
    run = trainer(tmp_path / "run", model, peft_config=lora())
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    reloaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, run.policy.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    whole = trainer(tmp_path / "full", policy())
    whole.train()
    whole.save_model(str(tmp_path / "model"))
    assert "tether" not in (tmp_path / "model" / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, whole.policy.eval()(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"loss_type": "sigmod"}, ConfigError, "did you mean sigmoid"),
        ({"loss_type": ["sigmoid", "kot"]}, ConfigError, "kot"),
        ({"beta": -0.1}, ConfigError, "above 0"),
        ({"label_smoothing": 0.7}, ConfigError, "below 0.5"),
        ({"truncation_mode": "ends"}, ConfigError, "keep_start, keep_end"),
        ({"max_length": 1}, ConfigError, "whole number from 2"),
        ({"scoring_layout": "grid"}, ConfigError, "tree, padded"),
        ({"reference": "old"}, ConfigError, "allowed are start, base, model, adapter, none"),
        ({"reference": "base", "reference_method": "model"}, ConfigError, "cannot compute"),
        ({"reference": "model"}, ConfigError, "no ref_model was given"),
        ({"label_smoothing_factor": 0.1}, ConfigError, "`label_smoothing` is the objective's"),
        ({"use_liger_kernel": True}, ConfigError, "which scoring relies on"),
        ({"reference_check_steps": -1}, ConfigError, "a whole number from 0"),
        ({"rows": "missing.jsonl"}, DataError, "missing.jsonl"),
        ({"model": "no/such/model/here"}, ConfigError, "does not exist"),
        ({"eval_strategy": "steps"}, ConfigError, "no eval_dataset"),
    ],
)
def test_wrong_arguments_are_refused_at_construction(arguments, error, words, tmp_path):
    """INV-24, 33."""
    with pytest.raises(error, match=words):
        trainer(tmp_path, **arguments)


def test_two_runs_of_one_configuration_are_one(tmp_path):
    """The adapter's random start is part of the configuration's seed, from a script as from the command line."""
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(found))
        found.append(weights(trainer(tmp_path, peft_config=lora(), seed=seed)))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert not all(torch.equal(value, found[2][name]) for name, value in found[0].items())


def test_several_gpus_without_a_launcher_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(DPOConfig, "n_gpu", 2)
    with pytest.raises(ConfigError, match="torchrun --nproc_per_node 2"):
        trainer(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"data_collator": lambda rows: {"input_ids": rows}}, "dictionary with a ScoringBatch"),
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, "models in memory"),
        ({"model_init_kwargs": "{broken"}, "not JSON"),
        ({"reference_method": "bogus"}, "adapter_off, adapter_on, snapshot, model"),
        ({"max_length": "1024"}, "whole number"),
        ({"peft_config": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}, "could not be resumed"),
    ],
)
def test_more_wrong_arguments(arguments, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        trainer(tmp_path, **arguments).train()


def test_wrong_calls_are_refused(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(ConfigError, match="args is a TrainingArguments"):
        DPOTrainer(
            model=policy(), args=TrainingArguments(str(tmp_path)), train_dataset=ROWS, processing_class=TOKENIZER
        )
    run = trainer(tmp_path)
    with pytest.raises(ConfigError, match="has no meaning here"):
        run.predict(ROWS)
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        run.evaluate("nowhere.jsonl")


def test_an_adapter_on_an_adapter_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="already has an adapter"):
        trainer(tmp_path, get_peft_model(policy(), lora()), peft_config=lora())


def test_the_load_balancing_loss_reaches_the_policy_and_never_the_reference(tmp_path):
    """It moves a router that the pair loss cannot move, is logged, and the reference pass does not compute it."""
    asked = []
    run = trainer(tmp_path, tiny_model("mixtral", vocab_size=len(TOKENIZER)), router_aux_loss_coef=0.5, max_steps=1)
    inner = run.run.scorer

    def asking(model, batch, *, outputs=()):
        asked.append(outputs)
        return inner(model, batch, outputs=outputs)

    run.run = replace(run.run, scorer=asking)
    run.run.reference._scorer = asking
    run.train()
    assert [("aux_loss" in outputs) for outputs in asked].count(True) == 1
    assert len(asked) > 1
    (log,) = [log for log in run.state.log_history if "loss" in log]
    assert log["loss"] == pytest.approx(math.log(2) + 0.5 * log["aux_loss"], abs=1e-5)
    for coefficient in (0.0, None):
        plain = trainer(tmp_path, tiny_model("mixtral", vocab_size=len(TOKENIZER)), router_aux_loss_coef=coefficient)
        assert plain.run.router_weight == (0.001 if coefficient is None else 0.0)


def test_a_load_balancing_loss_needs_experts(tmp_path):
    with pytest.raises(ConfigError, match="no experts to balance"):
        trainer(tmp_path, router_aux_loss_coef=0.1)
    with pytest.raises(ConfigError, match="must be None or a number at least 0"):
        config(tmp_path, router_aux_loss_coef=-1.0)


class LiveTensors(TrainerCallback):
    """Numbers held in tensors that are alive after the third and after the thirtieth batch of an evaluation."""

    def __init__(self):
        self.batches, self.alive = 0, []

    def on_prediction_step(self, args, state, control, **kwargs):
        self.batches += 1
        if self.batches in (3, 30):
            gc.collect()
            self.alive.append(sum(one.numel() for one in gc.get_objects() if type(one) is torch.Tensor))


@pytest.mark.parametrize("leak", [False, True], ids=["as it is", "negative control"])
def test_evaluation_memory_is_constant_in_the_size_of_the_data(leak, tmp_path, monkeypatch):
    """INV-20: ten times the rows, and as few tensors are alive."""
    watch, hoard = LiveTensors(), []
    run = trainer(tmp_path, callbacks=[watch], per_device_eval_batch_size=2)
    if leak:
        loss = run.run.algorithm.loss
        leaking = lambda *given: (hoard.append(given[0].token_logps), loss(*given))[1]  # noqa: E731
        monkeypatch.setattr(run.run.algorithm, "loss", leaking)
    run.evaluate(pair_rows(1) * 64)
    early, late = watch.alive
    assert (late == early) is not leak


def test_the_attention_backend_is_an_option_and_is_reported(tmp_path, caplog):
    """In one of the first lines; one that cannot train here is refused before a step."""
    with caplog.at_level("INFO", "tether"):
        trainer(tmp_path, attention_backend="sdpa")
    assert "scoring: tree layout, sdpa attention, at most" in caplog.text
    with pytest.raises(ConfigError, match="no backward on a CPU"):
        trainer(tmp_path, attention_backend="flex")
    with pytest.raises(ConfigError, match="allowed are auto, blocked, sdpa, flex, varlen, flash"):
        config(tmp_path, attention_backend="eager")


def freeze(name):
    def change(model):
        for key, tensor in model.named_parameters():
            if name in key:
                tensor.requires_grad_(not tensor.requires_grad)

    return change


class ChangesAfter(TrainerCallback):
    """Does something to the model after the first step."""

    def __init__(self, change):
        self._change = change

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self._change(model)


@pytest.mark.parametrize(
    ("adapter", "change", "said"),
    [
        (True, lambda model: model.base_model.disable_adapter_layers(), "28 tensors no longer train"),
        (True, freeze("base_layer"), "14 tensors train that were frozen"),
        (False, freeze("norm"), "5 tensors no longer train, such as 'model.layers.0.input_layernorm.weight'"),
    ],
)
def test_what_trains_stays_what_it_was(adapter, change, said, tmp_path):
    """Callbacks that freeze, unfreeze (LISA, gradual unfreezing) or leave an adapter switched off."""
    with pytest.raises(ReferencePolicyError, match=f"after step 1 {said}"):
        trainer(tmp_path, callbacks=[ChangesAfter(change)], **({"peft_config": lora()} if adapter else {})).train()


def test_an_adapter_that_a_callback_switches_off_and_on_is_as_it_was(tmp_path):
    """The control: what is put back is no change, and the run is the one without the callback."""

    def look(model):
        with model.disable_adapter():
            pass

    runs = [
        trainer(tmp_path / str(i), peft_config=lora(), callbacks=[ChangesAfter(one)])
        for i, one in enumerate((look, lambda model: None))
    ]
    for run in runs:
        run.train()
    first, second = map(weights, runs)
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_an_epoch_without_a_batch_is_refused(tmp_path):
    """With `dataloader_drop_last`; transformers ends in an error of `max_steps`, or makes no step."""
    with pytest.raises(ConfigError, match="the 3 training rows do not fill one batch of 4"):
        trainer(tmp_path, rows=ROWS[:3], dataloader_drop_last=True)
    run = trainer(tmp_path, rows=ROWS[:5], dataloader_drop_last=True, max_steps=-1, num_train_epochs=2)
    run.train()
    assert run.state.global_step == 2


def test_a_schedule_of_another_optimizer_is_refused(tmp_path):
    """Its rates would be logged, and another one used."""
    model = policy()
    given = torch.optim.SGD(model.parameters(), lr=0.01)

    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)

    with pytest.raises(ReferencePolicyError, match=r"LambdaLR.* was made for another optimizer"):
        trainer(tmp_path, model, optimizers=(None, schedule(given))).train()
    run = trainer(tmp_path, model, optimizers=(given, schedule(given)))
    run.train()
    assert {log["learning_rate"] for log in run.state.log_history if "loss" in log} == {0.001}


def test_an_optimizer_of_a_part_is_said(tmp_path, caplog):
    model = policy()
    part = [tensor for name, tensor in model.named_parameters() if "layers.0" in name]
    run = trainer(tmp_path, model, optimizers=(torch.optim.SGD(part, lr=0.01), None))
    before = weights(run)
    run.train()
    assert "it holds 9 of the 21 tensors that want a gradient" in caplog.text
    after = weights(run)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        name for name in after if "layers.0" in name
    }


def test_a_parametrised_weight_is_known_before_the_first_step(tmp_path):
    """Plain loading has no place for its tensors; under an adapter it is frozen, and the base brings it."""
    model = policy()
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    with pytest.raises(ConfigError, match=r"2 trained tensors, such as .*up_proj\.parametrizations.*remove_param"):
        trainer(tmp_path, model)
    torch.nn.utils.parametrize.remove_parametrizations(model.model.layers[0].mlp.up_proj, "weight")
    trainer(tmp_path, model).train()


def test_gradients_that_are_switched_off_are_told_as_that(tmp_path):
    """Around `train()`, around the model's making, or by a callback."""
    with torch.no_grad(), pytest.raises(ReferencePolicyError, match="Gradients are switched off in step 1"):
        trainer(tmp_path).train()
    switched = ChangesAfter(lambda model: torch.autograd.set_grad_enabled(False) and None)
    try:
        with pytest.raises(ReferencePolicyError, match="Gradients are switched off in step 2"):
            trainer(tmp_path, callbacks=[switched]).train()
    finally:
        torch.set_grad_enabled(True)
    with torch.inference_mode():
        model = policy()
    with pytest.raises(ReferencePolicyError, match=r"made inside torch\.inference_mode"):
        trainer(tmp_path, model)


def test_a_compiled_policy_is_saved_under_its_names(tmp_path):
    """It was trained, and saved under names that nothing loads."""
    run = trainer(tmp_path, torch.compile(policy(), backend="eager"), max_steps=1)
    run.train()
    run.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    plain = trainer(tmp_path / "plain", max_steps=1)
    plain.train()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, plain.policy.state_dict()[name])


def test_an_option_that_is_set_later_is_refused_where_it_would_do_nothing(tmp_path):
    """`beta` was read when the trainer was made; a learning rate is read in `train()`, as transformers does."""
    run = trainer(tmp_path / "before")
    run.args.beta = 0.5
    with pytest.raises(ConfigError, match=r"beta was 0\.1 when the trainer was made and is 0\.5 now"):
        run.train()

    class Later(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.beta = 0.5

    with pytest.raises(ConfigError, match=r"beta was 0\.1 when the trainer was made"):
        trainer(tmp_path / "callback", callbacks=[Later()]).train()
    run = trainer(tmp_path / "rate")
    run.args.learning_rate = 0.005
    run.train()
    assert run.state.log_history[0]["learning_rate"] == 0.005


def test_an_autocast_around_a_trainer_is_told_as_that(tmp_path):
    """It was called a frozen tensor that changed."""
    run = trainer(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ConfigError, match=r"^train\(\) was called inside torch.autocast\('cpu'\)"):
            run.train()
        with pytest.raises(ConfigError, match="constructor was called inside"):
            trainer(tmp_path)
