"""`tether data check` and `tether data show`: what they print, write, and exit with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Workplace
from tether.cli.main import main


@pytest.fixture
def rows(workplace: Workplace) -> Path:
    """Pairs of which one is identical, one broken in its type, and one repeats another."""
    pairs = [*workplace.pairs(8), {"prompt": "film:", "chosen": " same", "rejected": " same"}, workplace.pairs(8)[0]]
    workplace.write_rows([*pairs, {"prompt": "film:", "chosen": None, "rejected": " x"}], "odd.jsonl")
    return workplace.path / "odd.jsonl"


def test_check_prints_what_was_found(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(rows)]) == 0
    out = capsys.readouterr().out
    assert "train: 11 rows, pair" in out
    assert "row 11: `chosen` is missing (null)" in out
    assert "name a --tokenizer" in out


def test_check_says_which_columns_it_does_not_read(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    """A spreadsheet's ` chosen` is no column `chosen`, and rows that have it are not prompts alone."""
    workplace.write_rows([{**row, "note": "x"} for row in workplace.pairs(2)], "noted.jsonl")
    assert main(["data", "check", str(workplace.path / "noted.jsonl")]) == 0
    assert "not read: columns note" in capsys.readouterr().out
    (workplace.path / "blanks.csv").write_text("prompt, chosen, rejected\nA, b, c\n", encoding="utf-8")
    assert main(["data", "check", str(workplace.path / "blanks.csv")]) == 2
    assert "` chosen` to `chosen`, spelt as it is here" in capsys.readouterr().err


def test_check_prints_json_with_lengths(workplace: Workplace, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(rows), "--json", "--tokenizer", str(workplace.path / "model")]) == 0
    [found] = json.loads(capsys.readouterr().out)["sets"]
    assert found["findings"]["identical"] == {"count": 1, "share": 1 / 11, "rows": [9]}
    assert found["findings"]["duplicates"]["rows"] == [10]
    assert found["lengths"]["limits"]["512"]["cut"] == 0.0


def test_limits_of_a_run_file_end_in_exit_code_1(
    workplace: Workplace, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace.path)
    text = (workplace.path / "run.yaml").read_text(encoding="utf-8")
    for limit, code in ((0.5, 0), (0.01, 1)):
        changed = text.replace("train: pairs.jsonl", f"train: odd.jsonl\n  check: {{identical: {limit}}}")
        Path("run.yaml").write_text(changed, encoding="utf-8")
        assert main(["data", "check", "run.yaml"]) == code
        printed = capsys.readouterr()
        assert ("Limit passed: train: 9.09% of the rows" in printed.err) == bool(code)
        assert "eval: 8 rows" in printed.out
    Path("run.yaml").write_text(text.replace("train: pairs", "check: {identcal: 1}\n  train: pairs"), encoding="utf-8")
    assert main(["data", "check", "run.yaml"]) == 2
    assert "`identcal` is not known" in capsys.readouterr().err


def test_inv_39_pages_escape_what_is_in_the_data(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "<script>alert(1)</script>"
    workplace.write_rows([{"prompt": evil, "chosen": f" {evil} a", "rejected": f" {evil} b"}] * 2, "evil.jsonl")
    model, page = str(workplace.path / "model"), workplace.path / "page.html"
    for command in (["check"], ["show"]):
        arguments = [str(workplace.path / "evil.jsonl"), "--tokenizer", model, "--html", str(page)]
        assert main(["data", *command, *arguments]) == 0
        text = page.read_text(encoding="utf-8")
        assert "<script>alert" not in text
        assert text.count("<script") <= 1  # the page's own, named by its hash
        assert "default-src" in text
        assert "<svg" in text or 'class="boundary"' in text
    capsys.readouterr()


def test_show_prints_tokens_and_the_boundary(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(workplace.path / "model")
    assert main(["data", "show", str(workplace.path / "pairs.jsonl"), "--tokenizer", model, "--row", "3"]) == 0
    out = capsys.readouterr().out
    assert "film<unk>2:▌" in out  # the tokenizer of the test has no space
    assert "<unk>good<unk>2</s>" in out
    assert "completion 1: 8 tokens, 8 scored" in out


def test_options_of_check_and_show(
    workplace: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them changes what is found or shown."""
    monkeypatch.chdir(workplace.path)
    Path("both").mkdir()
    workplace.write_rows(workplace.pairs(5), "both/train.jsonl")
    workplace.write_rows(workplace.pairs(3), "both/test.jsonl")
    tokenizer = ("--tokenizer", "model")

    def checked(*arguments: str) -> list[dict[str, Any]]:
        assert main(["data", "check", "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)["sets"]

    def shown(*arguments: str) -> str:
        assert main(["data", "show", *arguments, *tokenizer]) == 0
        return capsys.readouterr().out

    assert [checked("both", "--split", name)[0]["rows"] for name in ("train", "test")] == [5, 3]
    train, held_out = checked("pairs.jsonl", "--eval", "held_out.jsonl")
    assert (train["rows"], held_out["rows"]) == (24, 8)
    assert train["findings"]["in_evaluation"]["count"] == 8
    assert checked("pairs.jsonl", "--sample", "6")[0]["rows"] == 6
    assert checked("pairs.jsonl", *tokenizer, "--max-length", "9")[0]["findings"]["truncated"]["count"] == 24
    whole, other = shown("pairs.jsonl", "--row", "2"), shown("both", "--split", "test", "--row", "2")
    assert whole == other
    assert "2:" in shown("both", "--split", "test", "--row", "3")
    cut = shown("pairs.jsonl", "--max-length", "10")
    assert cut != shown("pairs.jsonl")
    assert shown("pairs.jsonl", "--max-length", "10", "--truncation", "keep_end") != cut
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    workplace.write_rows([{"messages": turns}], "talk.jsonl")
    template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}</s>{% endfor %}"
    workplace.write_tokenizer(eos_token="</s>", pad_token="<pad>", chat_template=template)
    every, last = (shown("talk.jsonl", "--turns", which) for which in ("all", "last"))
    assert every != last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "pairs.jsonl"], "There is no tokenizer to show tokens with"),
        (["show", "pairs.jsonl", "--tokenizer", "model", "--row", "99"], "--row is 99; there are 24 rows"),
        (["check", "pairs.jsonl", "--kind", "pairs"], "--kind is pairs; it must be pair, ranked"),
        (["check", "pairs.jsonl", "--format", "hhh"], "there is no format `hhh`. Did you mean `hh`?"),
        (["check", "none.jsonl"], "there is no file `none.jsonl`"),
    ],
)
def test_wrong_words_are_refused(
    arguments: list[str],
    message: str,
    workplace: Workplace,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(workplace.path)
    assert main(["data", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_control_characters_do_not_reach_the_terminal() -> None:
    from tether.cli.data.tables import visible

    assert visible("a\x1b[2J\tb\n") == "a\\x1b[2J⇥b⏎\n"
