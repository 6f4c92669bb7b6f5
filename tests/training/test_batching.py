"""A budget of tokens splits a step, and nothing but its memory changes (INV-25, 26, 7)."""

from __future__ import annotations

import ctypes
import logging
import os
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import BatchSampler
from transformers import TrainerCallback

import tether.compute.memory as memory
from tether import DPOConfig, DPOTrainer
from tether.errors import ConfigError
from tether.scoring import pack
from tether.training.budget import (
    TokenBudget,
    even_out,
    fewest_groups,
    joined,
    packed_tokens,
    padded_tokens,
)
from tether.training.step import own_rows
from tether.types import Example, Tree
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer

ROWS = pair_rows(12)
TOKENIZER = tiny_tokenizer()


def policy(seed=0):
    return tiny_model(seed=seed, vocab_size=len(TOKENIZER), pad_token_id=0, bos_token_id=1, eos_token_id=2)


def trainer(folder, *, rows=ROWS, kind=DPOTrainer, ref_model=None, adapter=True, callbacks=None, **settings):
    defaults = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,  # clipping would hide a wrong scale
        **QUIET,
        "gradient_checkpointing": False,
    }
    return kind(
        model=policy(),
        ref_model=ref_model,
        args=DPOConfig(output_dir=str(folder), **{**defaults, **settings}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(pair_rows(7)),
        processing_class=TOKENIZER,
        callbacks=callbacks,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None,
    )


def weights(run):
    return {name: tensor.detach().clone() for name, tensor in run.policy.named_parameters() if tensor.requires_grad}


def examples(count, seed=0):
    draw = random.Random(seed)

    def ids(low):
        return [draw.randrange(3, 40) for _ in range(draw.randint(low, 9))]

    made = []
    for i in range(count):
        completions = [ids(2) for _ in range(draw.randint(1, 3))]
        scored = [[k > 0 or len(c) == 1 for k in range(len(c))] for c in completions] if i % 2 else None
        made.append(Example.of(ids(1), completions, i, values={"weight": i / 4}, scored=scored))
    return made


@pytest.mark.parametrize("cost", [packed_tokens, padded_tokens])
def test_groups_fit_and_hold_each_example_once(cost):
    """Never over the budget but for an example alone; never more groups than first-fit decreasing makes."""
    draw = random.Random(0)
    for _ in range(200):
        lengths = [
            (draw.randint(1, 50), (draw.randint(1, 50), draw.randint(1, 50))) for _ in range(draw.randint(1, 12))
        ]
        trees, budget = [Tree(0, *length) for length in lengths], draw.randint(40, 400)
        groups = fewest_groups(trees, budget, cost)
        sizes = [cost([trees[i] for i in group]) for group in groups]
        assert sorted(i for group in groups for i in group) == list(range(len(trees)))
        assert all(size <= budget or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
        assert sizes == sorted(sizes, reverse=True)
        bins: list[list[Tree]] = []
        for tree in sorted(trees, key=lambda tree: -cost([tree])):
            fitting = next((one for one in bins if cost([*one, tree]) <= budget), None)
            bins.append([tree]) if fitting is None else fitting.append(tree)
        assert len(groups) <= len(bins)
        for count in range(len(groups), len(groups) + len(trees) + 2):
            more, repeats = even_out(groups, trees, count, cost)
            assert len(more) + len(repeats) == count
            assert sorted(i for group in more for i in group) == list(range(len(trees)))
            assert not repeats or len(more) == len(trees)


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(("tokens", "layout"), [(60, None), (1, None), (500, "padded")])
@pytest.mark.sweep(1)
def test_one_gradient_for_every_budget(tokens, layout, adapter, tmp_path, caplog):
    """INV-25, 26: weights, losses and every metric, with and without accumulation, as with no budget at all."""
    caplog.set_level(logging.WARNING, logger="tether")

    def result(**settings):
        run = trainer(tmp_path, adapter=adapter, scoring_layout=layout, **settings)
        sizes = []
        split = run.run.budget.split
        run.run.budget.split = lambda *arguments: sizes.append(split(*arguments)) or sizes[-1]
        run.train()
        logs = [
            {
                name: value
                for name, value in log.items()
                if name not in ("grad_norm", "epoch", "tokens_per_second", "memory_peak_gib")
            }
            for log in run.state.log_history
            if "loss" in log
        ]
        return weights(run), logs, [len(parts) for parts in sizes], run.evaluate()

    whole, whole_logs, counts, evaluation = result(max_tokens_per_forward=None)
    assert counts == [1] * 4
    for settings in ({}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}):
        split, logs, counts, split_evaluation = result(max_tokens_per_forward=tokens, **settings)
        assert max(counts) > 1
        for log, expected in zip(logs, whole_logs, strict=True):
            assert log == pytest.approx(expected, abs=2e-5)
        for name, value in whole.items():
            torch.testing.assert_close(split[name], value, atol=1e-5, rtol=1e-4)
        for name in ("eval_loss", "eval_rewards/margins", "eval_entropy", "eval_logps/chosen"):
            assert split_evaluation[name] == pytest.approx(evaluation[name], abs=1e-5)
    assert sum("This is said once" in message for message in caplog.messages) == (0 if layout else 2)


def test_a_wrong_denominator_would_be_seen(tmp_path):
    """Negative control of the law above: each micro-batch as its own mean."""

    class OwnMean(DPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            own = replace(num_items_in_batch, totals=torch.tensor([inputs.batch.num_examples, 0, 0]))
            return super().compute_loss(model, inputs, return_outputs, own)

    expected, found = (
        trainer(tmp_path, kind=kind, max_tokens_per_forward=60, max_steps=1) for kind in (DPOTrainer, OwnMean)
    )
    expected.train()
    found.train()
    assert any(not torch.allclose(value, weights(found)[name], atol=1e-5) for name, value in weights(expected).items())


def test_repetitions_add_nothing(tmp_path):
    """What a process computes only to keep step with another: neither gradient, nor metrics, nor tokens."""

    def result(extra):
        run = trainer(tmp_path, max_tokens_per_forward=60, ref_model=policy(seed=1))
        original = run.run.budget.split

        def split(batch, *arguments):
            parts = original(batch, *arguments)
            return [*parts, *(type(parts[0])(pack(batch.examples[:1]), counts=False) for _ in range(extra))]

        run.run.budget.split = split
        run.train()
        logs = [log for log in run.state.log_history if "loss" in log]
        return weights(run), [(log["loss"], log["rewards/margins"], log["num_tokens"]) for log in logs]

    (plain, plain_logs), (repeated, repeated_logs) = result(0), result(2)
    assert plain_logs == repeated_logs
    assert all(torch.equal(value, repeated[name]) for name, value in plain.items())


@pytest.mark.slow
def test_a_resumed_run_splits_its_steps_alike(tmp_path):
    """INV-7, exactly."""

    def run(resume=None, folder="whole"):
        settings = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3}
        one = trainer(tmp_path / folder, max_tokens_per_forward=50, max_steps=4, **settings)
        one.train(resume_from_checkpoint=resume)
        return one

    whole = run()
    resumed = run(str(tmp_path / "whole" / "checkpoint-2"), "resumed")
    assert [log["loss"] for log in resumed.state.log_history if "loss" in log] == [
        log["loss"] for log in whole.state.log_history if "loss" in log
    ]
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


class Sync(TrainerCallback):
    """Sees whether the last backward of a step may combine gradients."""

    seen: list[bool]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.seen.append(self.trainer.accelerator.gradient_state.sync_gradients)


def test_gradients_are_combined_once_per_step(tmp_path):
    """What data parallelism and DeepSpeed go by: off in every micro-batch but the last, and on again after it."""
    watch = Sync()
    watch.seen = []
    run = trainer(tmp_path, max_tokens_per_forward=60, max_steps=1, callbacks=[watch])
    watch.trainer, during = run, []
    original = run.compute_loss

    def compute_loss(*arguments, **keywords):
        during.append(run.accelerator.gradient_state.sync_gradients)
        return original(*arguments, **keywords)

    run.compute_loss = compute_loss
    run.train()
    assert len(during) > 2
    assert during == [False] * (len(during) - 1) + [True]
    assert watch.seen == [True]


@pytest.mark.parametrize("value", ["much", 0, -5, 1.5, True])
def test_wrong_budgets_are_refused(value, tmp_path):
    with pytest.raises(ConfigError, match="max_tokens_per_forward is"):
        DPOConfig(output_dir=str(tmp_path), max_tokens_per_forward=value, use_cpu=True)


def test_what_must_stay_whole_is_not_split(tmp_path):
    """An objective that compares the rows of a micro-batch: `auto` leaves it alone, a number is an error (INV-24)."""
    assert trainer(tmp_path, loss_type="aot").run.budget.tokens is None
    with pytest.raises(ConfigError, match="another split is another loss"):
        trainer(tmp_path, loss_type=["sigmoid", "aot"], max_tokens_per_forward=100)


def test_the_automatic_budget_follows_memory_and_shapes(monkeypatch):
    """Half the memory, four times the layers: fewer tokens; never below what is of use; stable; said in one line."""
    model, device = policy(), torch.device("cpu")
    need = memory.bytes_per_token(model, checkpointing=False)
    assert memory.bytes_per_token(model, checkpointing=True) < need
    monkeypatch.setitem(memory._ENOUGH, "cpu", 2**40)
    own = sum(p.numel() * (p.element_size() + 12) for p in model.parameters())
    budgets = []
    for tokens in (2**14, 2**13, 2**13 - 64, 3):
        monkeypatch.setattr(memory, "machine_bytes", lambda tokens=tokens: own + 2 * need * tokens)
        budgets.append(memory.token_budget("auto", model, device, checkpointing=False)[0])
    assert budgets == [2**14, 2**13, 2**12, 1024]
    monkeypatch.undo()
    tokens, line = memory.token_budget("auto", model, device, checkpointing=False)
    assert tokens == 4096, "a tiny model on any machine: what is of use"
    assert line.startswith("batching: at most 4096 tokens a forward (auto:")
    assert memory.token_budget(77, model, device, checkpointing=False)[0] == 77


def test_processes_agree_on_the_number_of_micro_batches():
    """The one with fewer divides its largest, then repeats its shortest with no weight."""
    batch = pack(examples(3))
    other = SimpleNamespace(num_processes=2, device="cpu", gather=lambda own: torch.cat([own, torch.tensor([5])]))
    parts = TokenBudget(10_000).split(batch, other)
    assert [part.counts for part in parts] == [True, True, True, False, False]
    assert sum(part.batch.num_examples for part in parts if part.counts) == 3
    shortest = min(range(3), key=lambda i: packed_tokens([batch.forest.trees[i]]))
    assert all(part.batch.keys == pack([batch.examples[shortest]]).keys for part in parts[3:])


@pytest.mark.parametrize("rows", range(1, 17))
@pytest.mark.parametrize("processes", [2, 3])
def test_rows_that_fill_the_last_batches_of_an_epoch_are_taken_out(rows, processes):
    """As accelerate deals them: batches in turn, the last ones filled up from the beginning; each row counts once."""
    size, counted, order = 2, [], list(range(rows))
    dealt = BatchSamplerShard(BatchSampler(order, size, drop_last=False), processes, 0, even_batches=True)
    rounds = len(list(dealt))
    for rank in range(processes):
        batches = BatchSamplerShard(BatchSampler(order, size, drop_last=False), processes, rank, even_batches=True)
        for number, batch in enumerate(batches):
            state = SimpleNamespace(
                end_of_dataloader=number == rounds - 1, remainder=rows % (size * processes), active_dataloader=None
            )
            accelerator = SimpleNamespace(num_processes=processes, process_index=rank, gradient_state=state)
            examples = [Example.of([row + 3], [[1], [2]]) for row in batch]
            part = own_rows({"batch": pack(examples)}, accelerator, last=True)
            found = [int(example.prompt_ids[0]) - 3 for example in part.batch.examples]
            assert found == batch[: len(found)]
            counted += found if part.counts else []
    assert sorted(counted) == order


def test_processes_with_fewer_items_take_part_until_all_are_done():
    """Each process knows of the others only what `gather` says: here one other has four items."""
    others = iter([1, 1, 1, 1, 0, 0, 0, 0])
    accelerator = SimpleNamespace(
        num_processes=2, device="cpu", gather=lambda mine: torch.cat([mine, torch.tensor([next(others)])])
    )
    assert list(joined("ab", accelerator, together=True)) == ["a", "b", None, None]
    assert list(joined("ab", accelerator, together=False)) == ["a", "b"]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc keeps what is free")
def test_free_memory_between_kept_tensors_is_given_back():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    # Below what the library asks the system for one by one, and one of fifty stays.
    kept = [torch.ones(16 * 1024) for _ in range(2000)][::50]
    full = resident()
    assert full - resident() < 10 * 2**20  # it is not given back by itself
    memory.give_back()
    assert full - resident() > 80 * 2**20
    assert all(one.sum() == 16 * 1024 for one in kept)
