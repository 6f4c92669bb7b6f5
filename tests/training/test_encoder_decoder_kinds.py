"""KTO, SFT, ORPO and CPO of T5 and BART, end to end, against each sequence alone; and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

import tether
from tether.errors import ConfigError, DataError
from tether.models.structure import evaluation_mode
from tether.scoring import score
from tiny import pair_rows
from tiny_seq2seq import tiny_seq2seq, tiny_seq2seq_tokenizer
from training import plain

FAMILIES = ["t5_tied", "bart"]
PAIRS = pair_rows(8)
ROWS = {
    "KTO": [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
        for i, row in enumerate(PAIRS)
    ],
    "SFT": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS],
    "ORPO": PAIRS,
    "CPO": PAIRS,
}
ORACLES = {"KTO": plain.kto, "SFT": plain.sft, "ORPO": plain.orpo}


def policy(family, seed=0):
    return tiny_seq2seq(family, seed=seed, vocab_size=len(tiny_seq2seq_tokenizer(family)))


def build(folder, kind, family, *, rows=None, **arguments):
    config = getattr(tether, f"{kind}Config")
    settings = plain.settings(config, 8, arguments)
    if kind != "SFT":
        settings = {"beta": plain.BETA, **settings}
    return getattr(tether, f"{kind}Trainer")(
        model=arguments.pop("model", None) or policy(family),
        args=config(output_dir=str(folder), **settings),
        train_dataset=ROWS[kind] if rows is None else rows,
        processing_class=tiny_seq2seq_tokenizer(family),
        **arguments,
    )


def plain_rows(kind, family):
    """The rows as the tokenizer writes a source and a target by itself."""
    tokenizer, found = tiny_seq2seq_tokenizer(family), []
    for row in ROWS[kind]:
        given = tokenizer(row["prompt"], return_tensors="pt")
        given = {name: given[name] for name in ("input_ids", "attention_mask")}
        texts = [row["completion"]] if "completion" in row else [row["chosen"], row["rejected"]]
        ids = [tokenizer(text_target=text)["input_ids"] for text in texts]
        found.append(plain.Row(given, ids, row.get("label", True)))
    return found


def losses(run):
    return [log["loss"] for log in run.state.log_history if "loss" in log]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ORACLES)
@pytest.mark.sweep(1)
def test_steps_and_evaluation_are_those_of_each_sequence_alone(kind, family, tmp_path):
    """INV-16, 41: losses of three steps and of an evaluation after them; another model as KTO's reference."""
    other = policy(family, 5) if kind == "KTO" else None
    expected = plain.descend(
        ORACLES[kind], plain.encoder_decoder_logps, policy(family), other, plain_rows(kind, family), plain.STEPS
    )
    more = {"ref_model": policy(family, 5)} if other is not None else {}
    run = build(tmp_path, kind, family, eval_dataset=ROWS[kind], **more)
    run.train()
    assert run.run.layout == "encoder_decoder"
    assert losses(run) == pytest.approx(expected[:-1], abs=1e-5)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected[-1], abs=1e-5)
    if kind == "KTO":
        assert run.evaluate()["eval_kl"] > 0, "the estimate is tested away from 0"
    # Negative control: prompts that are exchanged among the rows show.
    rows = plain_rows(kind, family)
    shifted = zip(rows, [*rows[1:], rows[0]], strict=True)
    moved = [plain.Row(one.given, two.completions, two.desirable) for one, two in shifted]
    with torch.no_grad():
        wrong = ORACLES[kind](plain.encoder_decoder_logps, policy(family), other, moved).item()
    assert wrong != pytest.approx(expected[0], abs=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROWS)
def test_splits_and_a_token_budget_change_nothing(kind, tmp_path):
    """INV-25."""
    runs = []
    for settings in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {"budget": 60}):
        budget = settings.pop("budget", None)
        runs.append(build(tmp_path, kind, "t5_tied", max_tokens_per_forward=budget, **settings))
        runs[-1].train()
    for run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0]), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_kto_with_a_store(family, tmp_path):
    """INV-12: mismatched completions of the encoder's prompts are entries of their own; several evaluation sets."""
    sets = {"first": ROWS["KTO"][:4], "second": ROWS["KTO"][4:]}
    live = build(tmp_path / "live", "KTO", family, ref_model=policy(family, 5), eval_dataset=sets)
    live.train()
    stored = build(
        tmp_path / "stored",
        "KTO",
        family,
        ref_model=policy(family, 5),
        eval_dataset=sets,
        precompute_ref_log_probs=True,
    )
    assert "store" in stored.run.line
    stored.train()
    assert losses(stored) == losses(live)
    first, second = live.evaluate(), stored.evaluate()
    names = [name for name in first if name.endswith(("_loss", "_kl"))]
    assert len(names) == 4
    assert [second[name] for name in names] == pytest.approx([first[name] for name in names], rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["KTO", "SFT"])
@pytest.mark.sweep(1)
def test_a_resumed_run_and_what_it_leaves(kind, family, tmp_path):
    """INV-7, 38: the rest of a run is the rest of the whole run, and plain transformers scores as it did."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 4}
    whole = build(tmp_path / "whole", kind, family, **saving)
    whole.train()
    rest = build(tmp_path / "rest", kind, family, **saving)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, rest.policy.state_dict()[name]), name
    rest.save_model()
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "rest").eval()
    with torch.no_grad(), evaluation_mode(rest.policy):
        expected = score(rest.policy, rest.run.probe, layout="encoder_decoder").token_logps
        found = score(again, rest.run.probe, layout="encoder_decoder").token_logps
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "words"),
    [
        ("SFT", {"completion_only_loss": False}, ConfigError, "Set completion_only_loss to None"),
        ("SFT", {"assistant_only_loss": True}, ConfigError, "Set assistant_only_loss to False"),
        ("SFT", {"rows": [{"text": "one text"}]}, DataError, r"one text each \(`text`\).*`prompt` and `completion`"),
        (
            "SFT",
            {"rows": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]},
            DataError,
            r"one text each \(`messages`\)",
        ),
        ("Reward", {"rows": PAIRS}, ConfigError, "an encoder and a decoder"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_what_an_encoder_cannot_do_is_refused_before_weights_load(kind, arguments, error, words, tmp_path):
    """INV-33; the model is named, and nothing of it but its configuration is read."""
    policy("bart").save_pretrained(tmp_path / "model")
    config = getattr(tether, f"{kind}Config")
    rows = arguments.pop("rows", ROWS["SFT"])
    with pytest.raises(error, match=words):
        getattr(tether, f"{kind}Trainer")(
            model=str(tmp_path / "model"),
            args=config(output_dir=str(tmp_path), use_cpu=True, report_to="none", **arguments),
            train_dataset=rows,
            processing_class=tiny_seq2seq_tokenizer("bart"),
        )


@pytest.fixture
def no_weights(monkeypatch):
    def load(*args, **kwargs):
        pytest.fail("weights were loaded before the input was refused")

    for name in ("models.spec.load_policy", "training.algorithms.reward.load_reward_model"):
        monkeypatch.setattr(f"tether.{name}", load)


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("kind", "loss"), [("KTO", "kto"), ("SFT", "sft")])
def test_a_run_file(kind, loss, tmp_path, monkeypatch, capfd):
    """`tether train` and `tether data check` of a folder that holds a T5 model."""
    from tether.cli.main import main

    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_seq2seq_tokenizer("bart")
    policy("bart").save_pretrained("model")
    tokenizer.save_pretrained("model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]), encoding="utf-8")
    beta = "" if kind == "SFT" else ", beta: 0.1"
    (tmp_path / "run.yaml").write_text(
        "model: model\ndata: {train: rows.jsonl, eval: {split: 2}, cache: null}\n"
        f"objective: {{loss: {loss}{beta}}}\noutput: out\n"
        "train: {max_steps: 2, learning_rate: 1e-2, batch_size: 3, logging_steps: 1, use_cpu: true}\n",
        encoding="utf-8",
    )
    assert main(["train", "run.yaml"]) == 0, capfd.readouterr().err
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert sum("loss" in line for line in logged) == 2
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out") is not None
