"""Training on a stream is training on the same rows in memory, and goes on exactly where it stopped (INV-7, 15, 34)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import IterableDataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, SequentialSampler

import streams
import tether
from support.processes import torchrun
from support.trainer_kinds import TOKENIZER, model_for
from tether.data.prepare.job import Options
from tether.data.prepare.stream import PreparedStream
from tether.data.sources.stream import RowStream
from tether.errors import ConfigError, DataError
from tether.training.source.dealing import Order, Position, StreamLoader
from tether.training.step import Filler
from tiny import QUIET, pair_rows

ROWS = pair_rows(45)
ROWS[12] = {**ROWS[12], "rejected": ROWS[12]["chosen"]}  # cannot be used
LABELLED = [
    {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
    for i, row in enumerate(ROWS)
]
LABELLED[12] = {**LABELLED[12], "completion": " "}
TEXTS = [{"prompt": row["prompt"], "completion": row["completion"]} for row in LABELLED]
KINDS = {
    "dpo": ("DPO", ROWS, {}),
    "kto": ("KTO", LABELLED, {"loss_type": "kto"}),
    "kto on pairs": ("KTO", ROWS[:23], {"loss_type": "kto"}),
    "sft": ("SFT", TEXTS, {}),
    "orpo": ("ORPO", ROWS, {}),
    "reward": ("Reward", [{**row, "margin": 0.1} for row in ROWS], {}),
}
# Kinds whose rows take the same way as another's are held to it by `make test-slow`.
EACH = [pytest.param(kind, marks=pytest.mark.slow) if kind in ("kto on pairs", "orpo") else kind for kind in KINDS]
# Steps of 4 x 2 rows, of which 44 make five and a half: the second pass begins with the seventh.
SETTINGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 8,
    "train_sampling_strategy": "sequential",
    "learning_rate": 0.01,
    **QUIET,
    "gradient_checkpointing": False,
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    streams.small_chunks(monkeypatch)


def trainer_of(folder, kind="dpo", rows=None, *, stream=True, eval_dataset=None, **changes):
    trainer, own_rows, own_settings = KINDS[kind]
    settings = {**SETTINGS, "stream_dataset": stream, **own_settings, **changes}
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS" if trainer == "Reward" else "CAUSAL_LM")
    torch.manual_seed(0)
    return getattr(tether, f"{trainer}Trainer")(
        model=model_for(trainer),
        args=getattr(tether, f"{trainer}Config")(output_dir=str(folder), **settings),
        train_dataset=own_rows if rows is None else rows,
        eval_dataset=eval_dataset,
        processing_class=TOKENIZER,
        peft_config=adapter,
    )


def trained(trainer, **resume):
    """The rows of each batch with their completions, and the losses."""
    batches, inner = [], trainer.run.algorithm.begin_step

    def begin_step(step, passes):
        rows = [[one for part in share for one in part.batch.examples] for share in step.shares]
        batches.append([[(one.source_row, [ids.tolist() for ids in one.completion_ids]) for one in b] for b in rows])
        return inner(step, passes)

    trainer.run.algorithm.begin_step = begin_step
    trainer.train(**resume)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return batches, [log["loss"] for log in logs], logs


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.sweep(1)
def test_a_stream_gives_the_batches_of_a_set_in_memory(kind, tmp_path):
    """INV-34: with an unusable row among them, the last step of a pass not full, and a second pass."""
    in_memory = trained(trainer_of(tmp_path / "memory", kind, stream=False))
    changes = {"dataset_num_proc": 2} if kind == "dpo" else {}
    streamed = trained(trainer_of(tmp_path / "stream", kind, **changes))
    assert streamed[0] == in_memory[0]
    assert streamed[1] == in_memory[1]
    assert len(streamed[0]) == 8
    assert [len(step) for step in streamed[0]].count(1) == 1
    rows = [row for step in streamed[0] for batch in step for row, _ in batch]
    assert 12 not in rows
    assert rows[0] == 0

    other = [ROWS[1], ROWS[0], *ROWS[2:]]
    if kind == "dpo":
        assert trained(trainer_of(tmp_path / "other", kind, rows=other))[0] != in_memory[0]


def test_the_classes_of_a_stream_are_counted_in_its_first_chunk(tmp_path, caplog):
    caplog.set_level("INFO", "tether")
    trainer_of(tmp_path, "kto").train()
    assert caplog.text.count("labels: 6 desirable and 4 undesirable rows") == 1


@pytest.mark.slow
def test_a_budget_of_tokens_and_a_data_set_of_the_library_change_nothing(tmp_path):
    """INV-34, with micro-batches; and `epoch` in the logs counts passes."""
    in_memory = trained(trainer_of(tmp_path / "memory", stream=False, max_tokens_per_forward=150))
    lazy = IterableDataset.from_generator(lambda: iter(ROWS))
    streamed = trained(trainer_of(tmp_path / "stream", rows=lazy, stream=False, max_tokens_per_forward=150))
    assert streamed[:2] == in_memory[:2]
    assert [log["epoch"] for log in streamed[2]][5:7] == [1.0, pytest.approx(1 + 2 / 11)]


# -- the loader, without a trainer -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared():
    with pytest.MonkeyPatch.context() as patch:
        streams.small_chunks(patch)
        yield PreparedStream(RowStream(ROWS), TOKENIZER, Options(512))


def dealt(rows):
    return {"rows": rows}


def numbers(loader):
    """The rows of each batch that count."""
    return [[] if isinstance(batch, Filler) else [row["source_row"] for row in batch["rows"]] for batch in loader]


@pytest.mark.sweep(10)
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 4, 11, 30])
def test_rows_are_dealt_as_accelerate_deals_them(prepared, size, processes, drop_last):
    """INV-34 over processes: accelerate's own sharding is the oracle, without the rows that it repeats."""
    rows = [i for i in range(45) if i != 12]
    for index in range(processes):
        batches = BatchSampler(SequentialSampler(rows), size, drop_last)
        share = BatchSamplerShard(batches, processes, index) if processes > 1 else batches
        expected = [[rows[i] for i in batch] for batch in share]
        remainder = len(rows) % (size * processes)
        if remainder and not drop_last and processes > 1:
            expected[-1] = expected[-1][: max(0, remainder - index * size)]
        loader = StreamLoader(prepared, Order(size, processes, drop_last=drop_last), index, dealt)
        if expected:
            assert numbers(loader) == expected
            continue
        with pytest.raises(DataError, match="too few rows for a batch of every process in pass 1"):
            numbers(loader)


def test_rows_are_drawn_from_a_buffer_each_once_and_otherwise_in_each_pass(prepared):
    rows = [i for i in range(45) if i != 12]

    def drawn(epoch=0, **order):
        loader = StreamLoader(prepared, Order(4, **{"buffer_size": 15, **order}), 0, dealt)
        loader.set_epoch(epoch)
        return [row for batch in numbers(loader) for row in batch]

    first = drawn()
    assert sorted(first) == rows
    assert first != rows
    assert drawn() == first
    for other in (drawn(1), drawn(seed=1), drawn(buffer_size=14)):
        assert sorted(other) == rows
        assert other != first
    # A row comes at most a buffer early.
    assert all(row <= place + 16 for place, row in enumerate(first))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("buffer_size", [0, 3, 15, 100])
@pytest.mark.sweep(1)
def test_a_loader_goes_on_from_every_batch_of_two_passes(prepared, buffer_size, processes, tmp_path, monkeypatch):
    """INV-7: and chunks that were used up are not prepared again."""
    order = Order(5, processes, buffer_size=buffer_size, seed=5)
    whole, positions = StreamLoader(prepared, order, processes - 1, dealt), []
    batches = []
    for epoch in (0, 1):
        whole.set_epoch(epoch)
        for batch in whole:
            batches.append((epoch, batch))
            whole.position.write(tmp_path)
            positions.append((tmp_path / "stream.json").read_text())
    made_again, inner = [], PreparedStream._batches

    def counting(self, *arguments):
        for made in inner(self, *arguments):
            made_again.append(made[0])
            yield made

    monkeypatch.setattr(PreparedStream, "_batches", counting)
    for done, text in enumerate(positions, 1):
        (tmp_path / "stream.json").write_text(text)
        made_again.clear()
        rest, loader = [], StreamLoader(prepared, order, processes - 1, dealt)
        position = Position.read(tmp_path)
        loader.resume(position)
        for epoch in range(position.epoch, 2):
            loader.set_epoch(epoch)
            rest += [(epoch, batch) for batch in loader]
            if not buffer_size and processes == 1 and epoch == position.epoch and position.rounds == 6:
                assert made_again == [2, 3, 4]  # 30 rows are behind, 12 was unusable: chunk 3 holds the next
        assert rest == batches[done:]


def test_another_stream_is_noticed_on_resuming(prepared, tmp_path):
    loader = StreamLoader(prepared, Order(4), 0, dealt)
    for _ in zip(range(6), loader, strict=False):
        pass
    loader.position.write(tmp_path)
    position = Position.read(tmp_path)
    changed = [*ROWS[:25], {**ROWS[25], "chosen": " another"}, *ROWS[26:]]
    for rows, options in ((changed, Options(512)), (ROWS[:18], Options(512)), (ROWS, Options(40))):
        other = StreamLoader(PreparedStream(RowStream(rows), TOKENIZER, options), Order(4), 0, dealt)
        other.resume(Position.read(tmp_path))
        with pytest.raises(DataError, match="not those that the checkpoint was trained on"):
            list(other)
    with pytest.raises(ConfigError, match="batch_size 4 then and 8 now, seed 0 then and 1 now"):
        StreamLoader(prepared, Order(8, seed=1), 0, dealt).resume(position)
    anew = StreamLoader(prepared, Order(8, seed=1), 0, dealt)
    anew.resume(position, skip=False)
    assert sum(map(len, numbers(anew))) == 44


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffling", ["sequential", "random"])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.sweep(1)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(kind, shuffling, tmp_path):
    """INV-7: batches, losses, logs and weights; from the first pass, from its end, and from the second."""
    changes = {"train_sampling_strategy": shuffling, "dataset_buffer_size": 15}
    whole = trainer_of(tmp_path / "run", kind, save_strategy="steps", save_steps=1, **changes)
    expected = trained(whole)
    weights = {name: value.clone() for name, value in whole.policy.named_parameters()}
    for step in (2, 6, 7, 8) if kind == "dpo" else (3,):
        resumed = trainer_of(tmp_path / "run", kind, **changes)
        found = trained(resumed, resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert found[0] == expected[0][step:]
        assert found[1] == expected[1]
        assert [log["epoch"] for log in found[2]] == [log["epoch"] for log in expected[2]]
        for name, value in resumed.policy.named_parameters():
            assert torch.equal(value, weights[name]), name


def test_a_wrong_row_costs_nothing_that_was_trained_before_it(tmp_path):
    """The run stops with the row's number and a checkpoint of its last step; corrected, it ends as it would have."""
    path = tmp_path / "rows.jsonl"

    def write(rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(ROWS)
    expected = trained(trainer_of(tmp_path / "whole", rows=str(path)))
    write([*ROWS[:33], {**ROWS[33], "chosen": 3}, *ROWS[34:]])
    broken = trainer_of(tmp_path / "run", rows=str(path))
    with pytest.raises(
        DataError, match=r"row 34: `chosen` is a number.*The 3 steps before it are kept in .*checkpoint-3"
    ):
        trained(broken)
    write(ROWS)
    found = trained(trainer_of(tmp_path / "run", rows=str(path)), resume_from_checkpoint=True)
    assert found[:2] == (expected[0][3:], expected[1])
    write([*ROWS[:3], {**ROWS[33], "chosen": 3}, *ROWS[34:]])
    with pytest.raises(DataError, match="row 4: `chosen` is a number"):
        trainer_of(tmp_path / "first", rows=str(path))


@pytest.mark.slow
def test_the_store_is_filled_by_the_first_pass_or_ahead(tmp_path):
    """INV-12, 15: the second pass, and a second run, run no reference."""
    store = {"reference_store": str(tmp_path / "store"), "train_sampling_strategy": "random"}
    plain = trained(trainer_of(tmp_path / "plain", train_sampling_strategy="random"))
    filling = trainer_of(tmp_path / "filling", **store)
    assert trained(filling)[1] == pytest.approx(plain[1], abs=1e-6)
    assert filling.run.reference.computed == 2 * 44
    assert filling.run.reference.forwards == 11  # batches of the first pass
    again = trainer_of(tmp_path / "again", **store)
    assert trained(again)[1] == pytest.approx(plain[1], abs=1e-6)
    assert again.run.reference.forwards == 0

    ahead = trainer_of(tmp_path / "ahead", **{**store, "reference_store": str(tmp_path / "other"), "max_steps": 4})
    filled = ahead.precompute_reference()
    assert (filled.present, filled.computed) == (0, 2 * 32)  # four steps' rows, and no others
    forwards = ahead.run.reference.forwards
    trained(ahead)
    assert ahead.run.reference.forwards == forwards


@pytest.mark.slow
def test_reports_grow_with_the_stream(tmp_path, caplog):
    """INV-35: what was dropped, what repeats, and what is in an evaluation set, when a pass ends."""
    caplog.set_level("INFO", "tether")
    rows = [*ROWS, ROWS[40]]
    held = IterableDataset.from_generator(lambda: iter([ROWS[3], ROWS[44], {**ROWS[30], "chosen": " otherwise"}]))
    trainer = trainer_of(tmp_path / "run", rows=rows, eval_dataset=held)
    path = tmp_path / "run" / "data.json"
    first = json.loads(json.dumps(trainer.run.data.reports))
    assert not path.exists()  # the folder is this run's from its first step on
    assert (first["train"]["rows"], first["eval"]["rows"]) == (10, 3)
    assert "eval: a streamed set, read whole: 3 rows" in caplog.text
    assert first["train"]["audit"]["sampled_rows"] == 10
    trainer.train()
    found = json.loads(path.read_text())
    assert "train (pass 1, up to here): 45 of 46 pairs" in caplog.text
    assert found["eval"]["overlap"] == {"rows": 1, "prompts": 1, "train_rows": found["train"]["kept"]}
    assert found["train"]["streamed"] == {"pass": 2, "from_kept_row": 0}
    assert "eval: 2 of 45 training rows are in this evaluation set word for word, and 3 share a prompt" in caplog.text
    assert trainer.evaluate()["eval_loss"] > 0
    memory = trainer_of(tmp_path / "memory", rows=rows, stream=False).run.data.reports["train"]
    assert memory["kept"] == 45
    assert memory["duplicates"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": -1}, "max_steps is -1, and the training rows are streamed"),
        ({"dataloader_num_workers": 2}, "Set dataset_num_proc to prepare them in several processes"),
        ({"eval_dataset": {"split": 0.1}}, "eval asks for a part of the training rows, which are streamed"),
        ({"dataset_buffer_size": 0}, "dataset_buffer_size is 0; it must be a whole number from 1 row"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_stream_cannot_do_is_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        trainer_of(tmp_path, **changes)


def test_a_checkpoint_of_rows_in_memory_is_no_place_in_a_stream(tmp_path):
    trainer_of(tmp_path, stream=False, save_strategy="steps", save_steps=2, max_steps=2).train()
    with pytest.raises(ConfigError, match=r"checkpoint-2 has no stream\.json"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_stream_that_ends_for_good_is_an_error(tmp_path):
    """A generator that gives its rows once would otherwise end the run early, in silence."""
    left = [2]

    def once():
        left[0] -= 1
        return iter(ROWS if left[0] >= 0 else [])

    with pytest.raises(DataError, match="the stream gave no rows in pass 2 over it"):
        trainer_of(tmp_path, rows=IterableDataset.from_generator(once)).train()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_take_the_batches_that_they_take_in_memory(tmp_path):
    """INV-34: each its own, with the same losses and weights; rows in order, an uneven end where none counts twice."""
    worker = Path(__file__).parent / "worker_stream.py"
    for name in ("memory", "stream"):
        (tmp_path / name).mkdir()
        command = [*torchrun(2), str(worker), str(tmp_path / name), name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert (tmp_path / name / "rank1.json").is_file(), done.stderr[-3000:]
    shares = []
    for rank in (0, 1):
        found, expected = (
            json.loads((tmp_path / name / f"rank{rank}.json").read_text()) for name in ("stream", "memory")
        )
        assert found == expected
        shares.append(found["batches"])
        one, other = (load_file(tmp_path / name / f"rank{rank}.safetensors") for name in ("stream", "memory"))
        for tensor, value in other.items():
            assert torch.equal(one[tensor], value), tensor
    assert shares[0] != shares[1]
    assert {row for share in shares for step in share for batch in step for row in batch} == {*range(45)} - {12}
