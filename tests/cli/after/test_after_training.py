"""Commands after training, on a tiny run: what they print agrees with training, and wrong input is one paragraph."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cli.after.runs import Run
from tether.cli.main import main
from tether.config.model_names import named_model


def test_eval_agrees_with_the_evaluation_of_training(run: Run, call: Any) -> None:
    found = json.loads(call("eval", "out", "--data", "held_out.jsonl", "--json")[0])
    trained = run.metrics()
    assert found["overall"]["accuracy"][0] == pytest.approx(trained["eval_rewards/accuracies"])
    assert found["overall"]["margin"][0] == pytest.approx(trained["eval_rewards/margins"], abs=1e-5)
    assert found["chosen"][0] == pytest.approx(trained["eval_rewards/chosen"], abs=1e-5)
    assert found["proved"] is True
    assert found["kl"]["chosen"][0] > 1e-4
    out = call("eval", "out", "--data", "held_out.jsonl")[0]
    assert "prefers the chosen completion in" in out
    assert "KL(policy, reference)" in out


def test_eval_says_where_the_rows_are_those_of_training(run: Run, call: Any) -> None:
    said = "the run was trained on just these rows"
    assert said in " ".join(call("eval", "out", "--data", "pairs.jsonl")[0].split())
    assert said not in " ".join(call("eval", "out", "--data", "held_out.jsonl")[0].split())


def test_rows_may_be_named_as_in_a_run_file(run: Run, call: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The advice for a file whose columns have other names holds behind `--data` too."""
    plain = json.loads(call("eval", "out", "--data", "held_out.jsonl", "--json")[0])
    names = {"prompt": "Asked", "chosen": "Good, kind", "rejected": "Other"}
    rows = [{names[key]: value for key, value in row.items()} for row in run.place.pairs(8)]
    run.place.write_rows(rows, "odd.jsonl")
    mapping = json.dumps({"path": "odd.jsonl", "fields": names})
    found = json.loads(call("eval", "out", "--data", mapping, "--json")[0])
    assert found["overall"] == plain["overall"]
    assert json.loads(call("data", "check", mapping, "--json")[0])["sets"][0]["kind"] == "pair"
    assert main(["eval", "out"]) == 2
    assert "`tether eval --help` lists what there is" in capsys.readouterr().err.replace("main eval", "tether eval")


def test_an_accuracy_of_lengths_is_told_as_that(run: Run, call: Any) -> None:
    """Without a reference a sum of log-probs prefers what is shorter, which looked like a perfect model."""
    said = "the shorter completion has the larger reward in 100.0% of the pairs of unequal lengths"
    rows = [{**row, "rejected": row["rejected"] + " and more of that"} for row in run.place.pairs(8)]
    for name, swapped in (("short.jsonl", False), ("long.jsonl", True)):
        names = ("rejected", "chosen") if swapped else ("chosen", "rejected")
        written = [{**row, "chosen": row[names[0]], "rejected": row[names[1]]} for row in rows]
        run.place.write_rows(written, name)
        assert said in " ".join(call("eval", "model", "--data", name, "--reference", "none")[0].split())
    assert said not in " ".join(call("eval", "model", "--data", "short.jsonl", "--reference", "out")[0].split())
    alike = [{**row, "rejected": row["chosen"][::-1]} for row in run.place.pairs(8)]
    run.place.write_rows(alike, "alike.jsonl")
    assert "the shorter completion" not in call("eval", "model", "--data", "alike.jsonl", "--reference", "none")[0]


def test_eval_groups_by_columns(run: Run, call: Any) -> None:
    rows = [{**row, "kind": "ab"[n % 2], "size": n * 1.5} for n, row in enumerate(run.place.pairs(12))]
    run.place.write_rows(rows, "grouped.jsonl")
    found = json.loads(call("eval", "out", "--data", "grouped.jsonl", "--by", "kind", "--by", "size", "--json")[0])
    groups = found["by"]["kind"]
    assert [groups[name]["pairs"] for name in ("a", "b")] == [6, 6]
    weighted = sum(groups[name]["margin"][0] / 2 for name in "ab")
    assert weighted == pytest.approx(found["overall"]["margin"][0])
    assert [group["pairs"] for group in found["by"]["size"].values()] == [3, 3, 3, 3]


def test_a_model_against_itself_is_no_preference(call: Any) -> None:
    found = json.loads(call("eval", "out", "--data", "held_out.jsonl", "--reference", "out", "--json")[0])
    assert found["overall"]["ties"] == found["overall"]["pairs"] == 8
    assert found["kl"]["chosen"][0] == pytest.approx(0.0, abs=1e-6)


def test_a_checkpoint_and_the_start_have_names(run: Run, call: Any) -> None:
    steps = sorted(run.out.glob("checkpoint-*"))
    first = json.loads(call("eval", str(steps[0]), "--data", "held_out.jsonl", "--json")[0])
    last = json.loads(call("eval", "out", "--data", "held_out.jsonl", "--json")[0])
    assert first["overall"]["margin"][0] != pytest.approx(last["overall"]["margin"][0], abs=1e-4)
    start = json.loads(call("eval", "model", "--data", "held_out.jsonl", "--reference", "out:reference", "--json")[0])
    assert start["overall"]["margin"][0] == pytest.approx(0.0, abs=1e-6)


def test_score_writes_what_plain_peft_computes(run: Run, call: Any) -> None:
    call("score", "held_out.jsonl", "--model", "out", "--output", "s.parquet", "--kl")
    call("score", "held_out.jsonl", "--model", "out", "--output", "s.jsonl")
    table = parquet.read_table(run.path / "s.parquet")
    rows = table.to_pylist()
    lines = [json.loads(line) for line in (run.path / "s.jsonl").read_text().splitlines()]
    assert [row["logp"] for row in lines] == pytest.approx([row["logp"] for row in rows])
    assert [(row["row"], row["completion"]) for row in rows] == [(n, k) for n in range(8) for k in (0, 1)]
    for row in rows:
        assert row["reward"] == pytest.approx(0.1 * (row["logp"] - row["reference_logp"]), abs=1e-6)
    base = AutoModelForCausalLM.from_pretrained(run.path / "model")
    policy = PeftModel.from_pretrained(base, run.out).eval()
    tokenizer = named_model(str(run.out)).load().tokenizer
    pair = run.place.pairs(8)[0]
    prompt, text = (tokenizer(text)["input_ids"] for text in (pair["prompt"], pair["prompt"] + pair["chosen"]))
    ids = torch.tensor([[*text, tokenizer.eos_token_id]])
    with torch.no_grad():
        logps = policy(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    assert rows[0]["logp"] == pytest.approx(logps[len(prompt) - 1 :].sum().item(), abs=1e-4)
    assert rows[0]["tokens"] == len(ids[0]) - len(prompt)
    assert call("score", "held_out.jsonl", "--model", "out", "--output", "s.jsonl", code=2)[1].count("Error:") == 1


def test_merged_is_what_was_trained(run: Run, call: Any) -> None:
    found = json.loads(call("merge", "out", "--output", "whole", "--data", "held_out.jsonl", "--json")[0])
    assert found["base_proved"] is True
    assert found["effect"] > 100 * max(found["merged"], found["loaded"])
    assert found["dtype"] == found["trained_dtype"] == "float32"
    against = json.loads(call("eval", "whole", "--data", "held_out.jsonl", "--reference", "out", "--json")[0])
    assert abs(against["overall"]["margin"][0]) < 1e-5
    assert load_file(run.path / "whole" / "model.safetensors")
    _, error = call("merge", "whole", "--output", "again", code=2)
    assert "no adapter" in error
    _, error = call("merge", "out", "--output", "whole", code=2)
    assert "is there already" in error


def test_options_that_narrow_what_is_scored(run: Run, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which part of the rows, how much of each, and how much at once."""
    parts: list[int] = []
    monkeypatch.setattr("tether.evaluate.score_rows.each", lambda batches, words: parts.append(len(batches)) or batches)
    (run.path / "both").mkdir(exist_ok=True)
    run.place.write_rows(run.place.pairs(5), "both/train.jsonl")
    run.place.write_rows(run.place.pairs(3), "both/test.jsonl")

    def evaluated(*options: str) -> dict[str, Any]:
        return json.loads(call("eval", "out", "--no-kl", "--json", *options)[0])

    whole = evaluated("--data", "held_out.jsonl")
    little = evaluated("--data", "held_out.jsonl", "--max-tokens", "40")
    assert little["overall"]["margin"] == pytest.approx(whole["overall"]["margin"], abs=1e-5)
    assert parts[-1] > parts[-2] == 1
    cut = evaluated("--data", "held_out.jsonl", "--max-length", "10")
    assert cut["chosen"][0] != pytest.approx(whole["chosen"][0], abs=1e-4)
    assert [evaluated("--data", "both", "--split", name)["overall"]["pairs"] for name in ("train", "test")] == [5, 3]

    def scored(*options: str) -> list[dict[str, Any]]:
        (run.path / "narrow.jsonl").unlink(missing_ok=True)
        call("score", "--model", "out", "--output", "narrow.jsonl", *options)
        return [json.loads(line) for line in (run.path / "narrow.jsonl").read_text().splitlines()]

    assert len(scored("both", "--split", "test", "--max-tokens", "40")) == 6
    assert parts[-1] > 1
    assert all(row["tokens"] <= 2 for row in scored("held_out.jsonl", "--max-length", "9"))
    call("merge", "out", "--output", "of_a_part", "--data", "both", "--split", "test")
    assert "split" in call("merge", "out", "--output", "of_none", "--data", "both", "--split", "none", code=2)[1]


def test_merging_into_another_base_is_refused(run: Run, call: Any) -> None:
    file = run.path / "model" / "model.safetensors"
    held = load_file(file)
    try:
        save_file({name: value + 0.01 for name, value in held.items()}, file, metadata={"format": "pt"})
        _, error = call("merge", "out", "--output", "other", code=2)
        assert "--any-base" in error
        assert not (run.path / "other").exists()
        found = json.loads(call("merge", "out", "--output", "other", "--any-base", "--json")[0])
        assert found["base_proved"] is False
        assert "was trained against" in call("eval", "out", "--data", "held_out.jsonl")[1]
    finally:
        save_file(held, file, metadata={"format": "pt"})


def test_compare_puts_answers_side_by_side(run: Run, call: Any) -> None:
    options = ("--data", "held_out.jsonl", "--first", "3", "--max-new-tokens", "6", "--html", "page.html")
    found = json.loads(call("compare", "out:reference", "out", *options, "--json")[0])
    assert [row["prompt"] for row in found["rows"]] == ["film 0:", "film 1:", "film 2:"]
    assert any(row["left"] != row["right"] for row in found["rows"])
    same = json.loads(call("compare", "out", "out", "--prompt", "film <b>:", "--html", "page.html", "--json")[0])
    assert all(row["left"] == row["right"] for row in same["rows"])
    page = (run.path / "page.html").read_text()
    assert "film &lt;b&gt;:" in page
    assert "<script" not in page


def test_greedy_answers_are_those_of_transformers(run: Run, call: Any) -> None:
    found = json.loads(call("compare", "model", "out", "--prompt", "film 1:", "--max-new-tokens", "5", "--json")[0])
    loaded = named_model("model").load()
    ids = loaded.tokenizer("film 1:", return_tensors="pt")["input_ids"]
    model: Any = loaded.model
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert found["rows"][0]["left"] == loaded.tokenizer.decode(expected, skip_special_tokens=True)


def test_the_narrowest_nucleus_is_the_most_likely_token(run: Run, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run.place.write_rows([{"prompt": f"film {n}:"} for n in range(3)], "asked.jsonl")
    options = ("--data", "asked.jsonl", "--max-new-tokens", "6", "--json")

    def compared(*more: str) -> Any:
        return json.loads(call("compare", "out", "model", *options, *more)[0])["rows"]

    greedy = compared("--temperature", "0")
    assert compared("--temperature", "3", "--top-p", "1e-6") == greedy
    assert compared("--temperature", "3") != greedy
    (run.path / "asked").mkdir(exist_ok=True)
    run.place.write_rows([{"prompt": "film 9:"}], "asked/test.jsonl")
    run.place.write_rows([{"prompt": "film 8:"}], "asked/train.jsonl")
    found = call("compare", "out", "model", "--data", "asked", "--split", "test", "--max-new-tokens", "1", "--json")[0]
    assert [row["prompt"] for row in json.loads(found)["rows"]] == ["film 9:"]
    said = []
    for more in (("--temperature", "0"), ("--temperature", "3", "--top-p", "1e-6"), ("--temperature", "3")):
        monkeypatch.setattr("sys.stdin", io.StringIO("film 1:\n"))
        said.append(call("chat", "out", "--max-new-tokens", "6", "--json", *more)[0])
    assert said[0] == said[1] != said[2]


def test_chat_answers_lines_of_a_pipe(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("film 1:\n\n/new\nfilm 2:\n/quit\nnever\n"))
    lines = call("chat", "out", "--max-new-tokens", "4", "--json")[0].splitlines()
    found = [json.loads(line) for line in lines]
    assert [(row["prompt"], row["model"]) for row in found] == [
        ("film 1:", "out"),
        ("film 1:", "out:reference"),
        ("film 2:", "out"),
        ("film 2:", "out:reference"),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("eval", "nowhere", "--data", "held_out.jsonl"), "'nowhere'"),
        (("eval", "model:reference", "--data", "held_out.jsonl"), "is not the folder of a run"),
        (("eval", "out", "--data", "nothing.jsonl"), "nothing.jsonl"),
        (("eval", "out", "--data", "held_out.jsonl", "--by", "colour"), "no column 'colour'"),
        (("eval", "out", "--data", "prompts.jsonl"), "chosen"),
        (("score", "prompts.jsonl", "--model", "out", "--output", "x.jsonl"), "no completion to score"),
        (("score", "held_out.jsonl", "--model", "out", "--output", "x.csv"), ".parquet"),
        (("score", "held_out.jsonl", "--model", "model", "--output", "x.jsonl", "--kl"), "no reference"),
        (("compare", "out", "model"), "--prompt"),
        (("chat", "out", "--system", "Be kind."), "without turns"),
        (("merge", "out:reference", "--output", "x"), "is a reference"),
        (("merge", "out", "--output", "x", "--dtype", "int3"), "bfloat16"),
    ],
)
def test_wrong_input_is_one_paragraph(run: Run, call: Any, arguments: tuple[str, ...], words: str) -> None:
    run.place.write_rows([{"prompt": "film"}], "prompts.jsonl")
    _, error = call(*arguments, code=2)
    assert words in error
    assert error.count("Error:") == 1
    assert not (run.path / "x").exists()
