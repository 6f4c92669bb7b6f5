"""Every format goes through real steps of training on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data.test_formats import EXAMPLES
from data.test_fuzz import CANONICAL
from tether.data import example_from_row, prepare
from tether.objectives import preference_loss
from tether.scoring import pack, score
from tether.training import DPOConfig, DPOTrainer
from tiny import tiny_model, tiny_tokenizer

ALL = [(name, kind, row) for name, kind, row, _ in [*EXAMPLES, *CANONICAL] if kind != "prompt_only"]


def test_every_format_of_pairs_is_trained_on(tmp_path: Path) -> None:
    """One run of `DPOTrainer` over all of them at once, one source each."""
    pairs = [(name, row) for name, kind, row in ALL if kind == "pair" and "tools" not in row and "margin" not in row]
    sources: list[Any] = [
        {"path": [row], **({"format": name} if name else {})}
        for name, row in pairs
        if conversational(name, row)  # text and conversations are not mixed in one set
    ]
    assert len(sources) >= 20
    tokenizer = tiny_tokenizer()
    args = DPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
    )
    model = tiny_model(vocab_size=len(tokenizer))
    trainer = DPOTrainer(model=model, args=args, train_dataset=sources, processing_class=tokenizer)
    assert len(trainer.train_dataset) == len(sources)  # type: ignore[arg-type]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0]


def conversational(name: str | None, row: dict[str, Any]) -> bool:
    if name in (None, "passthrough") or str(name).startswith("user_defined"):
        return False
    return name != "openrlhf" or not isinstance(row.get("input"), str)


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
        loss = preference_loss(scores, scores_of_nothing(scores), loss="sigmoid", beta=0.1).per_example.sum()
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
