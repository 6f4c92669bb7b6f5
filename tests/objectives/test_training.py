"""Every objective through the trainer's own loss: one gradient for every split, layout and reference (INV-25).

One trainer for each layout and method, with an adapter that has moved from its start; objectives take turns in it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tether import DPOConfig, DPOTrainer
from tether.errors import ConfigError, DataError
from tether.objectives import OBJECTIVES, Combination
from tether.scoring import pack
from tether.training import DPO
from tether.training.setup.run import build_step
from tether.types import Example
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CHOICES = list(itertools.product(("tree", "padded"), ("adapter_off", "snapshot")))
COMBINATIONS = {
    **{
        name: Combination((name,), options={**row.defaults, **({"beta": 0.3} if "beta" in row.defaults else {})})
        for name, row in OBJECTIVES["dpo"].items()
        if row.kind in ("pair", "ranked")
    },
    "MPO": Combination(("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0)),
    "transformed": Combination(("sigmoid", "sft"), f_divergence_type="js_divergence", ld_alpha=0.4, use_weighting=True),
}


def config(folder, **changes):
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        **QUIET,
        "gradient_checkpointing": False,
    }
    return DPOConfig(output_dir=str(folder), **{**settings, **changes})


def trainer(folder, rows=None, **changes):
    sizes = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return DPOTrainer(
        model=tiny_model(num_hidden_layers=1, **sizes),
        args=config(folder, **changes),
        train_dataset=Dataset.from_list(rows or pair_rows(12)),
        eval_dataset=Dataset.from_list(pair_rows(7)) if rows is None else None,
        processing_class=TOKENIZER,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    )


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    made = {}
    for layout, method in CHOICES:
        # With a loss that takes the KL of whole distributions, so that the reference passes keep what it needs.
        settings = {"loss_type": "tdpo1", "reference": "start", "reference_method": method}
        one = trainer(tmp_path_factory.mktemp("run"), scoring_layout=layout, **settings)
        for name, parameter in one.policy.named_parameters():
            if "lora_" in name:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        made[layout, method] = one
    return made


def examples(kind):
    """Eight of uneven lengths, single tokens among them, with weights and margins."""
    generator = torch.Generator().manual_seed(5)

    def ids(longest):
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        return torch.randint(3, len(TOKENIZER), (length,), generator=generator).tolist()

    sizes = [3, 2, 4, 3, 3, 2, 4, 3] if kind == "ranked" else [2] * 8
    return [
        Example.of(ids(6), [[5]] + [ids(9) for _ in range(size - 1)], values={"weight": 0.5 + i / 4, "margin": i / 5})
        for i, size in enumerate(sizes)
    ]


def gradients(one, combination, split):
    """Loss and gradients of one optimizer step over eight examples in micro-batches of `split`."""
    algorithm = DPO(one.args, None)
    algorithm.__dict__["objective"] = combination
    one.run = replace(one.run, algorithm=algorithm)
    rows = examples(combination.kind)
    batches = [{"batch": pack(rows[start : start + split])} for start in range(0, len(rows), split)]
    step = build_step(batches, one.run, one.accelerator, one.args.device)
    one.policy.zero_grad()
    one.policy.train()
    loss = 0.0
    for part in step.parts:
        share = one.compute_loss(one.policy, part, num_items_in_batch=step)
        share.backward()
        loss += share.item()
    return torch.cat([torch.tensor([loss]), *(p.grad.flatten() for p in one.policy.parameters() if p.requires_grad)])


def close(found, expected):
    return torch.allclose(found, expected, atol=1e-5 * expected[1:].norm().item() + 1e-7, rtol=1e-4)


@pytest.mark.sweep(8)
@pytest.mark.parametrize("name", COMBINATIONS)
def test_one_gradient_for_every_layout_means_and_split(name, trainers):
    combination = COMBINATIONS[name]
    expected = gradients(trainers["tree", "adapter_off"], combination, 8)
    assert expected[1:].norm() > 1e-4
    for choice in CHOICES[1:]:
        assert close(gradients(trainers[choice], combination, 8), expected), choice
    split = gradients(trainers["tree", "adapter_off"], combination, 2)
    if any(row.averaged == "micro_batch" for row in combination.rows):
        assert not close(split, expected), "the row says that another split is another loss"
    else:
        assert close(split, expected)


def test_the_comparison_can_fail(trainers):
    """Negative control: another beta, and a reference that is not the start."""
    expected = gradients(trainers["tree", "adapter_off"], COMBINATIONS["sigmoid"], 8)
    other = dataclasses.replace(COMBINATIONS["sigmoid"], options={"beta": 0.31})
    assert not close(gradients(trainers["tree", "adapter_off"], other, 8), expected)
    assert not close(gradients(trainers["tree", "adapter_off"], Combination(("cpo",)), 8), expected)


def test_a_token_average_is_over_the_whole_step_and_the_whole_evaluation(tmp_path):
    """INV-25, 26 for what is averaged over tokens: training in 4 x 1 and 1 x 4, evaluation in batches of 1, 3 and 7."""
    runs = []
    for size, steps, evaluated in ((4, 1, 3), (1, 4, 1), (2, 2, 7)):
        one = trainer(
            tmp_path / f"{size}",
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, 0.5],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            per_device_eval_batch_size=evaluated,
        )
        one.train()
        logged = [log["loss"] for log in one.state.log_history if "loss" in log]
        runs.append([*logged, one.evaluate()["eval_loss"]])
    assert runs[1] == pytest.approx(runs[0], abs=1e-5)
    assert runs[2] == pytest.approx(runs[0], abs=1e-5)


def test_columns_of_weights_and_margins_reach_the_loss(tmp_path):
    """From the rows on: the first step's loss is that of the columns, since policy and reference are the same."""
    rows = [{**row, "weight": 0.5 + i % 2, "margin": 0.1 * i} for i, row in enumerate(pair_rows(4))]
    expected = [row["weight"] * math.log(1 + math.exp(row["margin"])) for row in rows]
    one = trainer(tmp_path, rows=rows, max_steps=1)
    one.train()
    assert one.state.log_history[0]["loss"] == pytest.approx(sum(expected) / 4, abs=1e-5)


def test_ranked_lists_train(tmp_path):
    """From the rows on, lists of 2, 3 and 4: the first loss is the mean of log K!, then it falls, for every split."""
    words = [" good", " fine, as such", " bad", " dull and long and dull"]
    sizes = (2, 3, 4, 3)
    rows = [{"prompt": f"Film {i} was", "completions": words[:size]} for i, size in enumerate(sizes)]
    losses = []
    for batch, accumulation in ((4, 1), (1, 4)):
        one = trainer(
            tmp_path / str(batch),
            rows=rows,
            loss_type="plackett_luce",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            learning_rate=2.0,
        )
        one.train()
        losses.append([log["loss"] for log in one.state.log_history if "loss" in log])
    assert losses[0][0] == pytest.approx(sum(math.log(math.factorial(size)) for size in sizes) / 4, abs=1e-5)
    assert losses[0][1] < losses[0][0] - 1e-3
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", ["sft", "simpo", "cpo", "orpo", "odds_ratio"])
def test_no_reference_is_run_where_none_is_needed(name, tmp_path):
    """INV-9, by counting: one forward in a step of one micro-batch; the proofs around the steps are not of a step."""
    one = trainer(tmp_path, loss_type=name, max_steps=1)
    assert one.run.reference.identity.meaning == "none"
    calls, step = [], one.training_step

    def watched(*args, **kwargs):
        hook = one.policy.get_base_model().register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        try:
            return step(*args, **kwargs)
        finally:
            hook.remove()

    one.training_step = watched
    one.train()
    assert calls == [True]
    assert not any(key.startswith("kl/") for log in one.state.log_history for key in log)


def test_a_reference_that_nothing_compares_with_is_refused(tmp_path):
    sizes = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with pytest.raises(ConfigError, match="compares with no reference"):
        DPOTrainer(
            model=tiny_model(num_hidden_layers=1, **sizes),
            ref_model=tiny_model(seed=1, num_hidden_layers=1, **sizes),
            args=config(tmp_path, loss_type="orpo"),
            train_dataset=Dataset.from_list(pair_rows(4)),
            processing_class=TOKENIZER,
        )


@pytest.mark.parametrize(
    ("loss", "values", "completions", "words"),
    [
        ("rpo", {}, 2, "add a column `margin`"),
        ("ipo", {"margin": 1.0}, 2, "which ipo would ignore"),
        ("sigmoid", {}, 3, "learns from pairs; the rows have"),
    ],
)
def test_rows_that_do_not_fit_the_objective_are_refused(loss, values, completions, words, trainers):
    one = DPO(trainers["tree", "snapshot"].args, None)
    one.__dict__["objective"] = Combination((loss,))
    with pytest.raises(DataError, match=words):
        one.check_rows(pack([Example.of([1], [[k + 3] for k in range(completions)], values=values)]))
