"""Every kind of adapter of the installed PEFT: right from start to a resumed run, or refused before weights load."""

from __future__ import annotations

import math

import pytest
import torch

import peft_kinds
from tether import DPOConfig, DPOTrainer
from tether.errors import ConfigError, ScoringError
from tether.models import load_policy
from tether.models.spec import ModelSpec
from tether.scoring import score_alone
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
# Refused before any weights are read, with a part of the reason.
REFUSED = {
    "MULTITASK_PROMPT_TUNING": "could not be resumed",
    "P_TUNING": "could not be resumed",
    "CPT": "could not be resumed",
    "CARTRIDGE": "could not be resumed",
    "POLY": "task_ids should not be None",
    "XLORA": "mixes adapters that were trained before, and its `adapters` names none",
}
# Refused where the layout is proved: a router that takes the mean over all tokens of a forward, as a run would tell.
MIXING = "LILY"
# Kinds that cannot be in a packed row: virtual tokens, and adapters that act by what is in a row.
PADDED = {"PROMPT_TUNING", "PREFIX_TUNING", "SHADOW", "alora"}
# One of each mechanism, in the ordinary suite.
SOME = ["POLY", "CPT", "LILY", "VERA", "alora", "UNILORA"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds") / "base"
    tiny_model(vocab_size=len(TOKENIZER), pad_token_id=0, bos_token_id=1, eos_token_id=2).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def config(name):
    """Tokens that a kind names are such as the rows have."""
    found = peft_kinds.config_of(name)
    ids = TOKENIZER(pair_rows(1)[0]["prompt"], add_special_tokens=False)["input_ids"][:2]
    for field in ("alora_invocation_tokens", "token_indices", "trainable_token_indices"):
        if getattr(found, field, None) is not None:
            setattr(found, field, ids)
    return found


def trainer(base, folder, name, **changes):
    settings = {
        "max_steps": 2,
        "learning_rate": 0.01,
        **QUIET,
        "gradient_checkpointing": False,
        "reference_check_steps": 1,
        "model_init_kwargs": {"dtype": "float32"},
        **changes,
    }
    return DPOTrainer(
        model=str(base),
        args=DPOConfig(output_dir=str(folder), **settings),
        train_dataset=pair_rows(8),
        eval_dataset=pair_rows(8),
        processing_class=TOKENIZER,
        peft_config=config(name),
    )


def alone(model, batch):
    with torch.no_grad():
        return score_alone(model.eval(), batch)


def margins(policy_logps, reference_logps, batch, beta=0.1):
    """Mean reward margin, from log-probabilities of tokens."""
    sums = torch.zeros(batch.num_completions).index_add(0, batch.completion_index, policy_logps - reference_logps)
    return beta * (sums[0::2] - sums[1::2]).mean().item()


def require_right(base, folder, name):
    """Start, reference before and after, scores, what is saved and loaded, and a resumed run."""
    run = trainer(base, folder, name, save_strategy="steps", save_steps=1)
    probe, reference = run.run.probe, run.run.reference
    start = alone(run.policy, probe)
    torch.testing.assert_close(reference.score(probe).token_logps, start, atol=1e-5, rtol=0)
    assert run.run.layout == ("padded" if name in PADDED else "tree")
    run.train()
    after = alone(run.policy, probe)
    assert (after - start).abs().max() > 1e-4
    torch.testing.assert_close(reference.score(probe).token_logps, start, atol=1e-5, rtol=0)
    losses = [log["loss"] for log in run.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    # The probe is the evaluation set: eight rows.
    said = run.evaluate()["eval_rewards/margins"]
    assert said == pytest.approx(margins(after, start, probe), abs=1e-5)
    run.save_model()
    again = load_policy(folder, dtype="float32")
    torch.testing.assert_close(alone(again, probe), after, atol=1e-5, rtol=0)
    resumed = trainer(base, folder, name)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    torch.testing.assert_close(alone(resumed.policy, probe), after, atol=1e-5, rtol=0)


def require_refused(base, folder, name):
    """With the reason, and before anything large is read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelSpec, "load_base", lambda _: pytest.fail("weights were loaded"))
        with pytest.raises(ConfigError, match=REFUSED[name]):
            trainer(base, folder, name)


@pytest.mark.sweep(2)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's and torch's own, about kinds that are experimental
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SOME else pytest.mark.slow)
        for name in (*peft_kinds.KINDS, *peft_kinds.VARIANTS)
    ],
)
def test_a_kind_is_right_or_refused(name, base, tmp_path):
    """INV-1, 2, 4, 7, 16, 38."""
    if name == MIXING:
        with pytest.raises(ScoringError, match="acts on a sequence by what else is in its rows"):
            trainer(base, tmp_path / "run", name)
        return
    (require_refused if name in REFUSED else require_right)(base, tmp_path / "run", name)


def test_all_kinds_are_tried():
    """A kind that a later PEFT has must be put into the table."""
    assert set(peft_kinds.FIELDS) == set(peft_kinds.PeftType)
