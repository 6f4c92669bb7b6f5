"""What was trained is what is saved, loaded, resumed and evaluated; what saving needs is known before a step."""

from __future__ import annotations

import json
import logging
import math
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from tether import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from tether.cli.errors import explain
from tether.compat.peft import restored_tensors
from tether.errors import ConfigError, TetherError
from tether.models import load_policy
from tether.models.adapting.base_rewriting import load_plain
from tether.models.adapting.extra_tensors import shared_by_hand
from tether.models.structure import trainable_tensors
from tether.scoring import score_alone
from tether.training.checkpoint import last_checkpoint
from tether.training.saving import preflight, reload
from tether.training.setup.policy import with_adapter
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LAYERS = ["q_proj", "v_proj", "down_proj"]
NORM = "base_model.model.model.norm.weight"
STEADY = {"learning_rate": 0.05, "lr_scheduler_type": "constant", "gradient_checkpointing": False}


def policy(**changes):
    return tiny_model(
        **{"vocab_size": len(TOKENIZER), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes}
    )


def lora(**changes):
    return LoraConfig(**{"r": 2, "target_modules": LAYERS, "task_type": "CAUSAL_LM", **changes})


@pytest.fixture
def base(tmp_path):
    """A base with its tokenizer on disk."""
    policy().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trainer(folder, model, *, peft_config=None, evaluation=None, kind=(DPOTrainer, DPOConfig), **changes):
    given = {name: changes.pop(name) for name in ("optimizers", "callbacks") if name in changes}
    make, config = kind
    return make(
        model=str(model) if not isinstance(model, torch.nn.Module) else model,
        args=config(output_dir=str(folder), **{"max_steps": 2, **QUIET, **STEADY, **changes}),
        train_dataset=pair_rows(8),
        eval_dataset=evaluation,
        processing_class=TOKENIZER,
        peft_config=peft_config,
        **given,
    )


def scores(model, run):
    with torch.no_grad():
        return score_alone(model.eval(), run.run.probe)


def require_same(model, run, atol=1e-5):
    torch.testing.assert_close(scores(model, run), scores(run.policy, run), atol=atol, rtol=0)


# -- tensors beside an adapter ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("kind", ["lora", "dora_bias", "prefix"])
@pytest.mark.sweep(1)
def test_what_trains_beside_an_adapter_is_saved_resumed_continued_and_merged(kind, base, tmp_path, caplog):
    """By plain PEFT, by Tether's loader, from a checkpoint, and again when the adapter is continued without it."""
    config = {
        "lora": lora(),
        "dora_bias": lora(use_dora=True, modules_to_save=["lm_head"]),
        "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }[kind]
    options = {"peft_config": config, "max_steps": 4, "train_parameters": ["norm"]}
    run = trainer(tmp_path / "run", base, save_strategy="steps", save_steps=2, **options)
    norm = next(name for name in trainable_tensors(run.policy) if name.endswith("model.norm.weight"))
    with caplog.at_level(logging.INFO, logger="tether"):
        run.train()
        run.save_model()
    assert "at most 0.0e+00 nats from memory" in caplog.text
    assert trainable_tensors(run.policy)[norm].std() > 1e-3
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (scores(plain, run) - scores(run.policy, run)).abs().max() > 1e-2
    require_same(PeftModel.from_pretrained(plain, tmp_path / "run"), run)
    again = trainer(tmp_path / "run", base, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    require_same(again.policy, run)
    assert f"- `{norm}`" in (tmp_path / "run" / "README.md").read_text()
    if kind == "lora":
        require_same(load_policy(tmp_path / "run", dtype="float32").merge_and_unload(), run)
    # The second generation trains no norms, and must not lose them.
    second = trainer(tmp_path / "second", tmp_path / "run", reference="start")
    require_same(second.policy, run)
    assert not any(name.endswith("norm.weight") for name in trainable_tensors(second.policy))
    second.train()
    second.save_model()
    require_same(load_policy(tmp_path / "second", dtype="float32"), second)
    assert torch.equal(
        load_file(tmp_path / "second" / "adapter_model.safetensors")[norm], trainable_tensors(run.policy)[norm]
    )


def test_peft_is_asked_what_it_would_restore_and_restores_nothing(base):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(modules_to_save=["lm_head"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = {name: torch.full_like(tensor, 7.0) for name, tensor in get_peft_model_state_dict(model).items()}
    file[NORM], file["base_model.model.no.such.weight"] = torch.zeros(32), torch.zeros(1)
    found, lost = restored_tensors(model, file, "default")
    assert lost == ["base_model.model.no.such.weight"]
    assert sorted(found) == sorted([NORM, *trainable_tensors(model)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    set_peft_model_state_dict(model, file, "default")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(found)


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_a_policy_whose_adapter_was_taken_off_is_neither_saved_nor_evaluated(how, base, tmp_path):
    """PEFT writes an adapter without tensors for it, and the merged weights are in no file."""
    run = trainer(tmp_path / "run", base, peft_config=lora(), evaluation=pair_rows()[:2])
    run.train()
    run.save_model(tmp_path / "before")
    merged = getattr(run.policy, how)()
    with pytest.raises(ConfigError, match=r"merged into it or taken off \(merge_and_unload, unload\)"):
        run.save_model(tmp_path / "after")
    assert not (tmp_path / "after").exists() or [*(tmp_path / "after").iterdir()] == []
    with pytest.raises(ConfigError, match="no policy without it to compare with"):
        run.evaluate()
    merged.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_a_file_without_them_is_found_out(base, tmp_path):
    """The control of the proof: the tensor that was taken out is named."""
    run = trainer(tmp_path / "run", base, peft_config=lora(), train_parameters=["norm"])
    run.train()
    run.save_model()
    path = tmp_path / "run" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[NORM]
    save_file(tensors, path)
    with pytest.raises(TetherError, match=r"cannot be loaded again.*other bytes"):
        run._saving.prove(run.policy, tmp_path / "run", shards=False)
    path.with_name(f"{path.name}.sha256").unlink()
    with pytest.raises(TetherError, match=rf"another model than the one in memory.*1 tensors differ, most '{NORM}'"):
        run._saving.prove(run.policy, tmp_path / "run", shards=False)


def test_the_best_model_has_them(base, tmp_path):
    run = trainer(
        tmp_path / "run",
        base,
        peft_config=lora(),
        train_parameters=["norm"],
        evaluation=pair_rows(3),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # of a loss that falls, the first is kept
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    require_same(load_policy(tmp_path / "run" / "checkpoint-1", dtype="float32"), run)
    last = load_policy(tmp_path / "run" / "checkpoint-2", dtype="float32")
    assert (scores(last, run) - scores(run.policy, run)).abs().max() > 1e-3


def test_such_an_adapter_is_not_loaded_beside_the_policys(base, tmp_path):
    run = trainer(tmp_path / "first", base, peft_config=lora(), train_parameters=["norm"])
    run.train()
    run.save_model()
    with pytest.raises(ConfigError, match=r"holds 5 tensors of its base model.*would change the policy"):
        trainer(tmp_path / "run", base, peft_config=lora(), reference_adapter=str(tmp_path / "first"))


def test_a_reward_adapter_is_proved_with_its_head(base, tmp_path, caplog):
    run = trainer(tmp_path / "run", base, peft_config=lora(task_type=None), kind=(RewardTrainer, RewardConfig))
    run.train()
    with caplog.at_level(logging.INFO, logger="tether"):
        run.save_model()
    assert "rows scored by the model as it is loaded, at most 0.0e+00 nats" in caplog.text


# -- tensors shared by hand ------------------------------------------------------------------------------------------


@pytest.mark.sweep(1)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_head_that_was_tied_by_hand_is_loaded_as_it_was(adapter, base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert list(shared_by_hand(model)) == ["lm_head.weight"]
    assert not shared_by_hand(policy(tie_word_embeddings=True))
    run = trainer(tmp_path / "run", model, peft_config=lora() if adapter else None)
    run.train()
    run.save_model()
    plain = AutoModelForCausalLM.from_pretrained(base if adapter else tmp_path / "run")
    require_same(PeftModel.from_pretrained(plain, tmp_path / "run") if adapter else plain, run)
    if not adapter:  # the control: transformers alone writes one tensor, and draws the head anew
        run.policy.save_pretrained(tmp_path / "plain")
        assert "lm_head.weight" not in load_file(tmp_path / "plain" / "model.safetensors")


# -- initialisations that write into the base ------------------------------------------------------------------------

REWRITING = {
    "niter": {"init_lora_weights": "pissa_niter_4"},
    "rslora_patterns": {
        "init_lora_weights": "pissa",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"down_proj": 3},
    },
    "olora_dora": {"init_lora_weights": "olora", "use_dora": True},
}


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA:UserWarning")  # PEFT's own conversion cannot do it
@pytest.mark.parametrize("kind", REWRITING)
@pytest.mark.sweep(1)
def test_an_adapter_that_rewrote_its_base_is_saved_as_plain_lora(kind, base, tmp_path):
    """It loads on the base as it was, whatever is drawn meanwhile; and a run goes on from it exactly."""
    run = trainer(
        tmp_path / "run", base, peft_config=lora(**REWRITING[kind]), max_steps=4, save_strategy="steps", save_steps=2
    )
    run.train()
    run.save_model()
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (saved["r"], saved["init_lora_weights"]) == (4, True)
    torch.manual_seed(77)
    require_same(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run"), run, atol=1e-4
    )
    again = trainer(tmp_path / "run", base, peft_config=lora(**REWRITING[kind]), max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    mine = dict(run.policy.named_parameters())
    assert all(torch.equal(tensor, mine[name]) for name, tensor in again.policy.named_parameters())


def test_a_resumed_run_whose_base_was_rewritten_otherwise_is_refused(base, tmp_path):
    config = lora(**REWRITING["niter"])
    trainer(tmp_path / "run", base, peft_config=config, save_strategy="steps", save_steps=1).train()
    other = trainer(tmp_path / "run", base, peft_config=config, seed=5)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    with pytest.raises(ConfigError, match="began with other values"):
        load_plain(other.policy, checkpoint)
    with pytest.raises(TetherError, match="Resuming with another reference"):
        other.train(resume_from_checkpoint=str(checkpoint))


def test_one_in_memory_that_no_file_could_hold_is_refused_before_the_first_step(base, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(**REWRITING["niter"]))
    with pytest.raises(ConfigError, match=r"would save is not what it trains.*give the base and peft_config"):
        trainer(tmp_path / "run", model)


# -- optimizers with averaged weights --------------------------------------------------------------------------------


class Averaging(torch.optim.Optimizer):
    """Gradient descent; in evaluation mode the weights are the mean of the start and now."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "live": True})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["start"] = parameter.detach().clone()

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["live"], "a step on averaged weights"
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"])

    @torch.no_grad()
    def _set(self, live):
        for group in self.param_groups:
            if live != group["live"]:
                for parameter in group["params"]:
                    start = self.state[parameter]["start"]
                    parameter.copy_(2 * parameter - start if live else (parameter + start) / 2)
            group["live"] = live

    def train(self):
        self._set(True)

    def eval(self):
        self._set(False)


def averaging(folder, base, **changes):
    model = AutoModelForCausalLM.from_pretrained(base)
    optimizer = Averaging(model.parameters(), 5.0)
    options = {
        "optimizers": (optimizer, None),
        "max_grad_norm": 0.0,
        "max_steps": 4,
        "evaluation": pair_rows(3),
        **changes,
    }
    return trainer(folder, model, eval_strategy="steps", eval_steps=2, **options), optimizer


def test_averaged_weights_are_evaluated_saved_and_resumed_from(base, tmp_path):
    run, optimizer = averaging(tmp_path / "run", base, save_strategy="steps", save_steps=2)
    run.train()
    run.save_model()
    said = [log["eval_loss"] for log in run.state.log_history if "eval_loss" in log][-1]
    assert run.evaluate()["eval_loss"] == pytest.approx(said, abs=1e-6)
    averaged = scores(run.policy, run)
    for folder in ("", "checkpoint-4"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / folder)
        torch.testing.assert_close(scores(loaded, run), averaged, atol=1e-5, rtol=0)
    optimizer.train()
    assert (scores(run.policy, run) - averaged).abs().max() > 1e-3
    again, optimizer = averaging(tmp_path / "run", base)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    torch.testing.assert_close(scores(again.policy, run), averaged, atol=1e-4, rtol=0)


def test_the_best_model_of_such_an_optimizer_is_not_averaged_once_more(base, tmp_path):
    run, _ = averaging(
        tmp_path / "run", base, save_strategy="steps", save_steps=2, load_best_model_at_end=True, greater_is_better=True
    )
    run.train()
    best = AutoModelForCausalLM.from_pretrained(run.state.best_model_checkpoint)
    torch.testing.assert_close(scores(run.policy, run), scores(best, run), atol=1e-6, rtol=0)


class Wrecking(torch.optim.SGD):
    """Leaves weights that are too large."""

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(1e38).mul_(1e38)


# -- what is not finite ----------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_stops_before_the_update(base, tmp_path):
    """Whatever is logged; the checkpoint before it stays, and the weights are those of the step before."""
    model = AutoModelForCausalLM.from_pretrained(base)
    calls = []

    def spoil(gradient):
        calls.append(1)
        return gradient * math.nan if len(calls) == 3 else gradient

    model.model.norm.weight.register_hook(spoil)
    run = trainer(tmp_path / "run", model, max_steps=4, logging_strategy="no", save_strategy="steps", save_steps=2)
    with pytest.raises(
        TetherError, match=r"The gradient of step 3 is not a number.*checkpoint is .*checkpoint-2"
    ) as error:
        run.train()
    assert explain(error.value)[1] == 1
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert all(
        torch.equal(mine, theirs) for mine, theirs in zip(run.policy.parameters(), kept.parameters(), strict=True)
    )


@pytest.mark.sweep(1)
@pytest.mark.parametrize("save", [True, False], ids=["at a save", "at the end"])
def test_weights_that_are_not_finite_are_not_saved(save, base, tmp_path):
    """The last update has wrecked them, and no loss follows that would show it."""
    changes = {"save_strategy": "steps", "save_steps": 1} if save else {}
    model = AutoModelForCausalLM.from_pretrained(base)
    optimizers = (Wrecking(model.parameters(), lr=0.1), None)
    run = trainer(tmp_path / "run", model, optimizers=optimizers, max_steps=1, logging_strategy="no", **changes)
    with pytest.raises(TetherError, match="not finite"):
        run.train()
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    with pytest.raises(TetherError, match="nothing was saved in"):
        run.save_model()


# -- what a run sets for itself --------------------------------------------------------------------------------------


def test_what_a_run_sets_for_itself_is_not_saved(tmp_path):
    model = policy()
    model.config.attention_dropout = 0.25
    assert model.config.use_cache
    run = trainer(tmp_path / "run", model)
    assert model.config.attention_dropout == 0.0
    assert model.config.use_cache
    run.train()
    run.save_model()
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["use_cache"], saved["attention_dropout"]) == (True, 0.25)
    assert model.config.attention_dropout == 0.0


def test_a_generation_configuration_that_transformers_refuses_is_saved_as_it_is(tmp_path, caplog):
    model = policy()
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = False
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "plain")
    with caplog.at_level(logging.WARNING, logger="tether"):
        run = trainer(tmp_path / "run", model, save_strategy="steps", save_steps=2)
    assert "would not save this generation configuration" in caplog.text
    run.train()
    saved = json.loads((tmp_path / "run" / "checkpoint-2" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["do_sample"]) == (0.7, False)
    assert run.policy.generation_config.temperature == 0.7


# -- what is known before the first step -----------------------------------------------------------------------------


def test_what_cannot_be_saved_is_known_before_the_first_step(tmp_path, monkeypatch):
    model = policy()
    model.config.notes = object()  # no JSON
    with pytest.raises(ConfigError, match="could not be saved when it is done: TypeError"):
        trainer(tmp_path / "run", model)
    assert not list((tmp_path / "run").glob(".rehearsal*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir is .* is not a folder"):
        trainer(tmp_path / "file" / "run", policy())
    monkeypatch.setattr(preflight, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="push_to_hub is on, and HF_HUB_OFFLINE is set"):
        trainer(tmp_path / "hub", policy(), push_to_hub=True)
    monkeypatch.setattr(preflight, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(preflight, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="nobody is logged in"):
        trainer(tmp_path / "hub", policy(), push_to_hub=True)
    with pytest.raises(ConfigError, match="hub_model_id is 'a//b'"):
        trainer(tmp_path / "hub", policy(), push_to_hub=True, hub_model_id="a//b")


def test_a_card_that_cannot_be_gone_on_from_is_known_before(base, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "README.md").write_text("---\n- a\n: b: c\n---\n")
    with pytest.raises(ConfigError, match="has a head that is not valid"):
        trainer(tmp_path / "run", base, peft_config=lora())


def test_the_best_metric_is_one_that_an_evaluation_gives(tmp_path, caplog):
    """Found by evaluating a few rows; several sets, and what a subclass adds, are known too."""
    sets = {"a": pair_rows(3), "b": pair_rows(2)}
    chosen = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    chosen |= {"load_best_model_at_end": True, "max_steps": 1}
    with pytest.raises(ConfigError, match=r"metric_for_best_model is 'loss', which no evaluation.*a_loss.*b_loss"):
        trainer(tmp_path / "run", policy(), evaluation=sets, **chosen)
    with pytest.raises(ConfigError, match=r"did you mean 'rewards/margins'"):
        trainer(tmp_path / "run", policy(), evaluation=pair_rows(3), metric_for_best_model="rewards/margin", **chosen)
    with caplog.at_level(logging.INFO, logger="tether"):
        trainer(tmp_path / "run", policy(), evaluation=pair_rows(3), metric_for_best_model="kl/k3", **chosen)
    assert "best model: the one with the highest kl/k3; greater_is_better says which" in caplog.text
    run = trainer(tmp_path / "run", policy(), evaluation=sets, metric_for_best_model="eval_b_rewards/margins", **chosen)
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")

    class More(DPOTrainer):
        def evaluate(self, *args, **kwargs):
            return {**super().evaluate(*args, **kwargs), "eval_mine": 1.0}

    run = trainer(
        tmp_path / "more",
        policy(),
        evaluation=pair_rows(3),
        kind=(More, DPOConfig),
        metric_for_best_model="mine",
        **chosen,
    )
    run.train()
    assert run.state.best_metric == 1.0


def test_optimizers_that_step_inside_the_backward_are_refused_with_the_reason(base, tmp_path):
    for name in ("galore_adamw_layerwise", "lomo"):
        with pytest.raises(ConfigError, match=f"optim is '{name}'. Such an optimizer steps inside the backward"):
            trainer(tmp_path / "run", tmp_path / "nowhere", optim=name, optim_target_modules="all-linear")
    with pytest.raises(ConfigError, match="layer-wise optimizer was given"):
        trainer(tmp_path / "run", base, optimizers=(LayerWiseDummyOptimizer(optimizer_dict={}), None))


# -- again -----------------------------------------------------------------------------------------------------------


def test_a_trainer_that_has_trained_says_so_and_goes_on_from_a_checkpoint(base, tmp_path):
    run = trainer(tmp_path / "run", base, peft_config=lora(), save_strategy="steps", save_steps=2)
    run.train()
    weights = scores(run.policy, run)
    with pytest.raises(ConfigError, match="has trained already, 2 steps"):
        run.train()
    assert torch.equal(scores(run.policy, run), weights)
    run.args.max_steps = 3
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 3
    assert not torch.equal(scores(run.policy, run), weights)


def test_what_a_checkpoint_lacks_does_not_begin_anew_in_silence(base, tmp_path, caplog):
    options = {"peft_config": lora(), "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path / "run", base, save_only_model=True, **options).train()
    short = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(ConfigError, match="without the optimizer and the schedule and the draws"):
        trainer(tmp_path / "run", base, **options).train(resume_from_checkpoint=short)
    with caplog.at_level(logging.WARNING, logger="tether"):
        trainer(tmp_path / "run", base, save_only_model=True, **options).train(resume_from_checkpoint=short)
    assert "moments and the learning-rate schedule begin anew" in caplog.text
    shutil.rmtree(tmp_path / "run")
    trainer(tmp_path / "run", base, **options).train()
    (tmp_path / "run" / "checkpoint-2" / "scheduler.pt").unlink()
    with pytest.raises(ConfigError, match=r"lacks scheduler.pt"):
        trainer(tmp_path / "run", base, save_only_model=True, **options).train(resume_from_checkpoint=short)


@pytest.mark.slow
def test_a_half_written_checkpoint_is_passed_over(base, tmp_path, caplog):
    run = trainer(tmp_path / "run", base, peft_config=lora(), save_strategy="steps", save_steps=1)
    run.train()
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").unlink()
    with caplog.at_level(logging.WARNING, logger="tether"):
        assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"
    assert "checkpoint-2 lacks trainer_state.json; it is passed over" in caplog.text
    again = trainer(tmp_path / "run", base, peft_config=lora())
    again.train(resume_from_checkpoint=True)
    require_same(again.policy, run)
    (tmp_path / "run" / "checkpoint-1" / "reference.json").unlink()
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        again.train(resume_from_checkpoint=True)


def test_an_adapter_says_which_revision_its_base_is(tmp_path):
    args = DPOConfig(output_dir=str(tmp_path), model_init_kwargs={"revision": "a1b2"}, report_to="none", use_cpu=True)
    assert with_adapter(policy(), lora(), args).peft_config["default"].revision == "a1b2"
    args.model_init_kwargs = None
    assert with_adapter(policy(), lora(), args).peft_config["default"].revision is None


# -- the proof at the end --------------------------------------------------------------------------------------------


def test_the_proof_says_why_it_could_not_be_made(base, tmp_path, caplog, monkeypatch):
    unnamed = trainer(tmp_path / "unnamed", policy(), peft_config=lora())
    named = trainer(tmp_path / "named", base, peft_config=lora())
    with caplog.at_level(logging.INFO, logger="tether"):
        unnamed.save_model()
        monkeypatch.setattr(reload, "room_for_another", lambda device: 1000)
        named.save_model()
    assert "not loaded again for comparison, as the base of the adapter was made in memory" in caplog.text
    assert "and 0.0 GiB are free" in caplog.text


def test_an_adapter_that_trains_in_bfloat16_is_found_to_be_what_was_saved(base, tmp_path, caplog):
    """PEFT loads adapters in float32; the same tensors in another type are rounded otherwise."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    policy = get_peft_model(model, lora(init_lora_weights=False), autocast_adapter_dtype=False)
    with caplog.at_level(logging.INFO, logger="tether"):
        trainer(tmp_path / "run", policy).save_model()
    assert "rows scored by the model as it is loaded, at most 0.0e+00 nats from memory" in caplog.text


def test_a_base_that_was_changed_in_memory_is_found_out(base, tmp_path):
    """The adapter's folder leads to the base on disk, which is another."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    run = trainer(tmp_path / "run", model, peft_config=lora())
    with pytest.raises(TetherError, match=r"another model than the one in memory.*most 'base_model.*up_proj.weight'"):
        run.save_model()
