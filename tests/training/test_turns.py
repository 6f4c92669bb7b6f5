"""`turns`: of completions of several turns, only what is asked for is scored, by every trainer that scores turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tether
from tether.config import load_run_file
from tether.errors import ConfigError
from tiny import tiny_model, tiny_tokenizer


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


TALKS = [
    (
        [assistant(f"it was {n}"), user("why"), assistant("because")],
        [assistant("bad"), user("why"), assistant(f"no {n}")],
    )
    for n in range(4)
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "DPO": [{"prompt": [user("the film")], "chosen": a, "rejected": b} for a, b in TALKS],
    "KTO": [{"prompt": [user(f"film {n}")], "completion": a, "label": n % 2 == 0} for n, (a, _) in enumerate(TALKS)],
    "SFT": [{"prompt": [user("the film")], "completion": a} for a, _ in TALKS],
    "ORPO": [{"prompt": [user("the film")], "chosen": a, "rejected": b} for a, b in TALKS],
}


def build(folder: Any, kind: str, **options: Any) -> Any:
    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = {
        "report_to": "none",
        "use_cpu": True,
        "max_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    args = getattr(tether, f"{kind}Config")(
        output_dir=str(folder), per_device_train_batch_size=4, **settings, **options
    )
    model = tiny_model(vocab_size=len(tokenizer))
    return getattr(tether, f"{kind}Trainer")(
        model=model, args=args, train_dataset=ROWS[kind], processing_class=tokenizer
    )


def plain_logp(model: Any, row: dict[str, Any], k: int, wanted: list[str]) -> float:
    """The log-probability of what stands in `wanted`, each with its end of turn, from the model's own logits."""
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([[*row["prompt_ids"], *row["completion_ids"][k]]])
    with torch.no_grad():
        logps = model.eval()(ids, use_cache=False).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    total, place = 0.0, len(row["prompt_ids"])
    for text in wanted:
        turn = tokenizer(f"{text}<|im_end|>")["input_ids"]
        whole = ids[0].tolist()
        at = next(n for n in range(place, len(whole)) if whole[n : n + len(turn)] == turn)
        total += logps[at - 1 : at - 1 + len(turn)].sum().item()
        place = at + len(turn)
    return total


@pytest.mark.parametrize(("turns", "places"), [("assistant", [0, 2]), ("last", [2])])
def test_dpo_scores_the_turns_that_are_asked_for(turns: str, places: list[int], tmp_path: Any) -> None:
    """Policy and reference alike, against each sequence alone; what the user says is not scored, and shows if it is."""
    run = build(tmp_path, "DPO", turns=turns)
    scores = run.run.reference.live.score(run.run.probe).token_logps
    found = torch.zeros(8).index_add(0, run.run.probe.completion_index, scores)
    model, sources = tiny_model(vocab_size=len(tiny_tokenizer())), [e.source_row for e in run.run.probe.examples]
    for n, source in enumerate(sources):
        row = next(one for one in run.train_dataset if one["source_row"] == source)
        for k, side in enumerate(("chosen", "rejected")):
            wanted = [ROWS["DPO"][source][side][place]["content"] for place in places]
            assert found[2 * n + k].item() == pytest.approx(plain_logp(model, row, k, wanted), abs=1e-4)
    whole = build(tmp_path, "DPO")
    assert int(whole.run.probe.targets.shape[0]) > int(run.run.probe.targets.shape[0]), (
        "by default the user's turn counts, too"
    )


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", ROWS)
def test_every_trainer_trains_on_the_last_turns_alone(kind: str, tmp_path: Any) -> None:
    run = build(tmp_path, kind, turns="last")
    run.train()
    masks = [mask for row in run.train_dataset["scored"] for mask in row[:1]]
    assert all(any(mask) and not all(mask) for mask in masks)
    assert run.run.data.reports["train"]["turns"] == "last"


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("DPO", {"turns": "first"}, "turns is 'first'; allowed are all, assistant, last"),
        ("Reward", {"turns": "last"}, "a reward is of the whole text"),
        ("SFT", {"turns": "last", "assistant_only_loss": True}, "Leave one out"),
        ("SFT", {"turns": "last", "completion_only_loss": False}, "Leave one of them out"),
    ],
)
def test_what_has_no_meaning_is_refused(kind: str, options: dict[str, Any], words: str, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=words):
        getattr(tether, f"{kind}Config")(output_dir=str(tmp_path), use_cpu=True, **options)


def test_a_run_file_may_ask_for_it(tmp_path: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: {train: a.jsonl}\ntrain: {turns: last}\n", encoding="utf-8")
    assert load_run_file(path).train.further["turns"] == "last"
    path.write_text("model: m\ndata: {train: a.jsonl}\ntrain: {turns: lst}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="all, assistant, last"):
        load_run_file(path)
