"""Every format goes through real steps of training on a tiny model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from data.samples import assistant, user
from support.format_examples import CANONICAL, EXAMPLES
from tether.data import example_from_row, load_rows, prepare, read_preferences
from tether.data.rows.formats import FORMAT_NAMES
from tether.objectives.preference_loss import preference_loss
from tether.scoring import pack, score
from tether.training import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from tiny import tiny_model, tiny_tokenizer


def form(row: dict[str, Any], name: str | None) -> str:
    """Text, or a conversation, or one of these without a boundary: what cannot be mixed in one set."""
    kind = next(own for one, own, other in ALL if one == name and other is row)
    data = load_rows([row] if name is None else {"path": [row], "format": name}, kind=kind)  # type: ignore[arg-type]
    schema = read_preferences(data, kind=kind)  # type: ignore[arg-type]
    return schema.form + (" whole" if schema.whole else " shared" if schema.shared_prompt else "")


ALL = [(name, kind, row) for name, kind, row, _ in [*EXAMPLES, *CANONICAL] if kind != "prompt_only"]


TRAINERS: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "pair": (DPOTrainer, DPOConfig, {}),
    "ranked": (DPOTrainer, DPOConfig, {"loss_type": ["plackett_luce"]}),
    "unpaired": (KTOTrainer, KTOConfig, {}),
    "completion": (SFTTrainer, SFTConfig, {}),
}
# Columns that a set has in every row or in none, and columns that only some trainers take.
GROUPS = sorted({(kind, form(row, name)) for name, kind, row in ALL})


@pytest.mark.parametrize(("kind", "own_form"), GROUPS)
@pytest.mark.sweep(4)
def test_every_format_is_trained_on(kind: str, own_form: str, tmp_path: Path) -> None:
    """Real steps of the trainer of its kind, all formats of a kind in one run, one source each: DPO for pairs and
    ranked lists, KTO for labelled completions, SFT for texts. Text and conversations are not mixed in one set."""
    rows = [(name, row) for name, own, row in ALL if own == kind and form(row, name) == own_form]
    sources: list[Any] = [{"path": [plain(row)], **({"format": name} if name else {})} for name, row in rows]
    if kind == "unpaired":  # KTO needs completions that differ, and these rows say the same in many formats
        sources += [{"path": [{"prompt": p, "completion": c, "label": False}]} for p, c in unlike(own_form)]
    trainer_class, config, options = TRAINERS[kind]
    tokenizer = tiny_tokenizer()
    args = config(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        dataset_cache=None,
        **options,
    )
    model = tiny_model(vocab_size=len(tokenizer))
    trainer = trainer_class(model=model, args=args, train_dataset=sources, processing_class=tokenizer)
    assert len(trainer.train_dataset) == len(sources)
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(map(math.isfinite, losses))
    assert any(not torch.equal(p, before[name]) for name, p in trainer.policy.named_parameters())
    if kind == "pair":
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6)


def test_no_format_is_left_out() -> None:
    """Every name of a format, and every kind that has rows to train on, is among what is trained on."""
    trained = {name.partition(".")[2] or name for name, *_ in ALL if name}
    assert {name.partition(".")[2] or name for name in FORMAT_NAMES} - trained <= {"default"} | trained
    assert {kind for kind, _ in GROUPS} == set(TRAINERS)


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the numbers that the others of its set do not have, and its label as a truth value."""
    kept = {column: value for column, value in row.items() if column not in ("weight", "margin")}
    return {**kept, "label": bool(kept["label"])} if "label" in kept else kept


def unlike(own_form: str) -> list[tuple[Any, Any]]:
    said = [("What?", " That."), ("Where?", " There.")]
    return said if own_form == "standard" else [([user(p)], [assistant(c)]) for p, c in said]


@pytest.mark.sweep(12)
@pytest.mark.parametrize(
    ("name", "kind", "row"), ALL, ids=[f"{name}-{kind}-{n}" for n, (name, kind, _) in enumerate(ALL)]
)
def test_every_format_gives_a_loss_and_a_gradient(name: str | None, kind: str, row: dict[str, Any]) -> None:
    """DPO for pairs and ranked lists (best against worst), likelihood for the others: what SFT and KTO are made of."""
    tokenizer = tiny_tokenizer()
    source: Any = [row] if name is None else {"path": [row], "format": name}
    prepared = prepare(source, tokenizer, max_length=128, kind=kind)  # type: ignore[arg-type]
    model = tiny_model(vocab_size=len(tokenizer))
    batch = pack([example_from_row(one) for one in prepared.dataset])
    scores = score(model, batch)
    if kind == "pair":
        loss = preference_loss(scores, scores_of_nothing(scores), loss="sigmoid", beta=0.1).values().sum()
    else:
        loss = -scores.mean_logps.mean()
    loss.backward()
    gradient = sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None)
    assert torch.isfinite(loss)
    assert gradient > 0


def scores_of_nothing(scores: Any) -> Any:
    """A reference that says 0 of every token."""
    from dataclasses import replace

    return replace(scores, token_logps=torch.zeros_like(scores.token_logps))
