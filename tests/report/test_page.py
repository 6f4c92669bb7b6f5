"""The page shows what the run folder holds, nothing else, and text stays text."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from support.report_pages import ATTACK, GUARD, IDENTITY, PAIRS, SIDE, STEP, Page, full_run, page_of, run_folder
from tether.data.audit.audit import FINDINGS
from tether.errors import ConfigError
from tether.evaluate.intervals import wilson_interval
from tether.report import write_report
from tether.report.cards import _FEW_ROWS
from tether.report.page import LARGEST_PAGE
from tether.report.read import read_run
from tether.report.sections.data import _FINDINGS
from tether.report.sections.headline import facts
from tether.training.surface.resolved_config import recorded


def test_a_configuration_that_cannot_be_read_is_shown_as_it_is(tmp_path: Path) -> None:
    """A number of 5,000 digits and a day that does not exist are no YAML for Python, and no error of YAML."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    for text in ("seed: " + "9" * 5000, "day: 2024-99-99", "a: ["):
        (tmp_path / "config.yaml").write_text(text)
        read = read_run(tmp_path)
        assert (read.config, read.config_text) == ({}, text)
        with pytest.raises(ConfigError, match=r"config\.yaml is not YAML: "):
            recorded(tmp_path / "config.yaml")


def test_of_a_models_path_the_facts_show_its_name_alone(tmp_path: Path) -> None:
    """A page is shown to others; the whole path is in the configuration below."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    for name, shown in (("/data/me/models/small.gguf", "small.gguf"), ("org/model", "org/model")):
        (tmp_path / "config.yaml").write_text(f"model: {name}")
        assert dict(facts(read_run(tmp_path)))["Model"] == shown


def test_a_full_run_is_told_in_words_and_numbers(tmp_path: Path) -> None:
    text = page_of(tmp_path / "first", **full_run()).text
    for said in (
        "first",
        "sigmoid, β 0.1",
        "LoRA, r 16",
        "0.710, interval 0.650 to 0.770, against 0.5",
        "95 % interval 0.650 to 0.770200 held-out pairsAbove chance",
        "The policy prefers the chosen completion in 71 % ± 6 of 200 held-out pairs; by chance it would be 50 %.",
        "The mean sentiment by VADER rose from 0.10 to 0.40 on 50 held-out prompts: +0.30 (95 % interval +0.20 to "
        "+0.40).",
        "0.10 → 0.40",
        "change +0.3095 % interval +0.20 to +0.4050 held-out prompts, judged by VADER",
        "Rose: the interval excludes zero",
        "The reference is the policy as it was before the first update.",
        "trainable tensors swapped for a copy kept from the start",
        "scored the same 8 rows; the log-probability of a token differed by at most 2.5e−7 nats",
        "the guard passed",
        "b2:00ff",
        "100 of 100 rows.All 2 figuresRows100Droppedidentical 3",
        "1,234 of 1,234 rows.",
        "Before−0.50bad",
        "After0.50+1.00good",
        "loss: sigmoid",
        "ln 2: policy equals reference",
    ):
        assert said in text


def test_the_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    source = write_report(run_folder(tmp_path / "run", **full_run())).read_text(encoding="utf-8")
    page = Page(source)
    assert set(page.tags).isdisjoint({"link", "img", "iframe", "object", "embed", "base", "form"})
    assert not {name for name, _ in page.attributes} & {"src", "href", "action", "background", "style"}
    assert not {name for name, _ in page.attributes if name.startswith("on")}
    assert not re.search(r"url\(|@import|https?:", source.replace("http://www.w3.org/2000/svg", ""))
    assert "prefers-color-scheme: dark" in source


def test_its_policy_names_its_own_script_and_style_and_no_other(tmp_path: Path) -> None:
    source = write_report(run_folder(tmp_path / "run", **full_run())).read_text(encoding="utf-8")
    hashes = []
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
        hashes.append(base64.b64encode(hashlib.sha256(text.encode()).digest()).decode())
    policy = dict(Page(source).attributes)["content"] and re.search(r'Policy" content="([^"]*)"', source)
    assert policy is not None
    assert html.unescape(policy[1]) == (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; base-uri 'none'; "
        "form-action 'none'"
    )


def poisoned(value: Any) -> Any:
    """The same structure with the attack in every string and name."""
    if isinstance(value, dict):
        return {key: poisoned(item) for key, item in value.items()} | {ATTACK: ATTACK}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return ATTACK if isinstance(value, str) else value


def test_inv_39_text_from_data_is_escaped_everywhere(tmp_path: Path) -> None:
    run = full_run()
    files = {name: poisoned(run[name]) for name in ("reference", "data", "evaluation", "samples", "pairs")}
    files["health"] = [{"step": 1, "name": ATTACK, "line": ATTACK}]
    files["data"][ATTACK] = {ATTACK: [ATTACK, {ATTACK: ATTACK}]}
    files["evaluation"][ATTACK] = {"value": 1.0, "low": ATTACK, "high": None}
    files["samples"].append({"prompt": [{"role": ATTACK, "content": ATTACK}], "before": {ATTACK: 1}, "after": None})
    files["metrics"] = [*run["metrics"], {"step": 3, f"eval_{ATTACK}_rewards/margins": 0.5, "loss": ATTACK}]
    files["config"] = (
        f"model: '{ATTACK.replace(chr(39), '')}'\nobjective: {{loss: [a, '<b>'], beta: x}}\nlora: {{r: <i>}}\n"
    )
    folder = tmp_path / "<script>alert(3)<"
    page = page_of(folder, **files)
    allowed = set(page_of(tmp_path / "clean", **run).tags) | {"br"}
    assert set(page.tags) <= allowed
    assert page.tags.count("script") == 1
    assert not {name for name, _ in page.attributes if name.startswith("on") or name == "src"}
    assert page.text.count("<script>alert(1)</script>") > 20
    assert "<script>alert(3)<" in page.text


def test_the_data_is_told_in_sentences_with_every_figure_folded(tmp_path: Path) -> None:
    train = {
        "name": "train",
        "rows": 9,
        "kept": 7,
        "lines": ["train: 7 of 9 pairs, 120 tokens (prompts once)", "train: dropped 2 with an empty completion"],
        "dropped": {"identical": 0, "empty_completion": 2},
        "lengths": {"prompt": {"min": 2, "p50": 8, "p90": 10, "max": 12.5}},
        "audit": {"sampled_rows": 9, "duplicates": 0.25, "openings": 0.01, "longer_wins": 0.9},
        "overlap": {"rows": 0, "prompts": 3},
    }
    page = page_of(tmp_path / "run", data={"train": train, "seed": 3})
    words = (
        "The dataTrain7 of 9 pairs, 120 tokens (prompts once).Dropped 2 with an empty completion.",
        "25 % of 9 rows repeat an earlier row.",
        "the longer one is the chosen one in 90 %: length alone gives much away.",
        "0 training rows are in it word for word, and 3 share a prompt with it.",
        "Promptmedian 8, nine in ten up to 10, longest 12.5median 8 tokens, nine in ten up to 10, longest 12.5",
        "All 6 figuresRows9Kept7Droppedempty completion 2Lengths · promptmin 2, p50 8, p90 10, max 12.5",
    )
    assert [said for said in words if said not in page.text] == []
    assert "FurtherAll 1 figuresSeed3" in page.text


def test_the_audits_words_are_the_audits() -> None:
    assert {name: FINDINGS[name] for name in _FINDINGS} == _FINDINGS


def test_missing_parts_are_left_out(tmp_path: Path) -> None:
    text = page_of(tmp_path / "bare").text
    for heading in ("The reference", "Before and after", "The data", "Configuration", "Reference guard"):
        assert heading not in text
    assert "Loss" in text
    assert "Steps2" in text


@pytest.mark.parametrize("left_out", ["config", "reference", "data", "evaluation", "samples", "pairs", "health"])
def test_any_one_part_may_be_missing(tmp_path: Path, left_out: str) -> None:
    run = full_run()
    del run[left_out]
    headings = {
        "config": "Configuration",
        "reference": "The reference",
        "data": "The data",
        "evaluation": "95 % interval",
        "samples": "Before and after",
        "pairs": "Held-out pairs",
        "health": "Needs attention",
    }
    text = page_of(tmp_path / "run", **run).text
    assert [heading for heading in headings.values() if heading not in text] == [headings[left_out]]


def test_values_that_are_not_numbers_do_no_harm(tmp_path: Path) -> None:
    run = full_run()
    run["evaluation"]["reward_accuracy"] = {"value": math.nan, "low": math.nan, "high": None, "n": 0}
    run["evaluation"]["sentiment"] = {"before_mean": None, "after_mean": math.inf, "difference": "x"}
    run["reference"]["guard"] = {"rows": None, "max_difference": math.inf, "tolerance": 1e-5, "passed": False}
    run["samples"] = [{"prompt": "a"}, {"before": "b", "score_before": math.nan, "score_after": 1.0}, "no row"]
    run["metrics"] = [
        {**STEP, "loss": math.nan, "grad_norm": None},
        {**STEP, "step": 2, "loss": -math.inf},
        {"step": None},
    ]
    text = page_of(tmp_path / "run", **run).text
    assert "Failed" in text
    assert "at most infinite nats" in text
    assert "no interval" in text
    assert "nan" not in text.lower().replace("finance", "")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.51, 0.7, "Above chance"),
        (0.2, 0.49, "Below chance"),
        (0.45, 0.6, "Not told apart from chance"),
        (0.5, 0.6, "Not told apart from chance"),
    ],
)
def test_a_verdict_follows_the_interval(tmp_path: Path, low: float, high: float, verdict: str) -> None:
    accuracy = {"reward_accuracy": {"value": (low + high) / 2, "low": low, "high": high, "n": 9}}
    assert verdict in page_of(tmp_path / "run", evaluation=accuracy).text


def test_without_evaluation_the_last_evaluation_of_training_stands_in(tmp_path: Path) -> None:
    run = full_run()
    del run["evaluation"]
    assert "Reward accuracy0.750last evaluation during training" in page_of(tmp_path / "run", **run).text


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        (
            {"identity": {**IDENTITY, "meaning": "none", "method": "none"}, "guard": None},
            "this objective needs no reference",
        ),
        ({"identity": {**IDENTITY, "meaning": "model"}, "guard": None}, "so the two were not compared"),
        ({"identity": IDENTITY, "guard": None}, "No comparison of the two before the first update is on record"),
        ({"identity": IDENTITY, "guard": {**GUARD, "passed": False}}, "the guard did not pass"),
    ],
)
def test_the_reference_is_told_as_it_was(tmp_path: Path, reference: dict[str, Any], said: str) -> None:
    assert said in page_of(tmp_path / "run", reference=reference).text


def test_the_later_line_of_a_resumed_step_counts(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 0.6}]
    text = page_of(tmp_path / "run", metrics=lines).text
    assert "train from 0.7 at step 1 to 0.6 at step 2" in text


def test_each_evaluation_set_has_its_line(tmp_path: Path) -> None:
    lines = [
        STEP,
        *({"step": 1, f"eval_{name}_rewards/margins": 0.5, f"eval_{name}_loss": 0.6} for name in ("help", "harm")),
    ]
    text = page_of(tmp_path / "run", metrics=lines).text
    assert "eval help from 0.6 at step 1" in text
    assert "eval harm from 0.6 at step 1" in text


def test_the_same_files_give_the_same_page_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", **full_run())
    before = {path.name for path in folder.iterdir()}
    first = write_report(folder).read_bytes()
    assert write_report(str(folder)).read_bytes() == first
    assert {path.name for path in folder.iterdir()} == before | {"report.html"}


def test_text_that_utf8_cannot_hold_is_replaced(tmp_path: Path) -> None:
    assert "a?b" in page_of(tmp_path / "run", samples=[{"prompt": "a\ud800b", "before": "", "after": ""}]).text


def test_no_metrics_is_an_error_that_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"looked for .*gone/metrics\.jsonl.*no such folder"):
        write_report(tmp_path / "gone")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"looked for .*metrics\.jsonl.*holds notes\.txt"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl is empty"):
        write_report(tmp_path)


def test_half_a_line_at_the_end_is_dropped_and_one_before_it_is_an_error(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(lines + '{"step": 3, "lo')
    assert "at step 2" in Page(write_report(folder).read_text(encoding="utf-8")).text
    (folder / "metrics.jsonl").write_text('{"step": 3, "lo\n' + lines)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 1 is not JSON"):
        write_report(folder)


@pytest.mark.parametrize(("name", "text"), [("samples", "{}"), ("reference", "[1]"), ("data", "{")])
def test_a_file_that_is_not_what_its_name_says_is_an_error(tmp_path: Path, name: str, text: str) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / f"{name}.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"{name}\.json .* remove it"):
        write_report(folder)


def _judged(tmp_path: Path, rows: int = 64, margin: tuple[float, float] | None = None, **last: float) -> str:
    """Verdicts of a run of 40 steps with a perfect accuracy, whose last log is changed."""
    first = {**STEP, "mean_token_accuracy": 0.4}
    lines = [first, {**first, "step": 40, **last}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {"reward_accuracy": {"value": 1.0, "low": 0.9, "high": 1.0, "n": rows}}
    if margin is not None:
        result["reward_margin"] = {"value": sum(margin) / 2, "low": margin[0], "high": margin[1], "n": rows}
    (tmp_path / "evaluation.json").write_text(json.dumps(result))
    source = write_report(tmp_path).read_text(encoding="utf-8")
    return " ".join(re.findall(r'<p class="verdict (\w+)">([^<]*)</p>', source)[0])


def test_a_run_that_learnt_is_judged_by_its_accuracy(tmp_path: Path) -> None:
    assert _judged(tmp_path) == "good Above chance"
    assert _judged(tmp_path, margin=(0.1, 0.5)) == "good Above chance"


@pytest.mark.parametrize(
    ("margin", "verdict"),
    [((0.1, 0.5), "good Above zero"), ((-0.5, -0.1), "bad Below zero"), ((-0.1, 0.5), "open Not told apart from zero")],
)
def test_a_margin_has_its_interval_and_its_verdict(margin: tuple[float, float], verdict: str, tmp_path: Path) -> None:
    _judged(tmp_path, margin=margin)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert " ".join(re.findall(r'<p class="verdict (\w+)">([^<]*)</p>', source)[1]) == verdict
    words = Page(source).text
    assert f"is {sum(margin) / 2:+.2f} (95 % interval {margin[0]:+.2f} to {margin[1]:+.2f})." in words.replace(
        "\u2212", "-"
    )
    assert f"95 % interval {margin[0]:.3f} to {margin[1]:.3f}".replace("-", "\u2212") in source.replace("-", "\u2212")


@pytest.mark.parametrize(
    ("last", "verdict"),
    [
        ({"mean_token_accuracy": 0.0}, "bad Above chance, but the model no longer predicts the tokens of the data"),
        ({"logps/chosen": -110.0}, "bad Above chance, but chosen completions became 80 nats less likely"),
        ({"eval_rewards/margins": 0.0}, "open Above chance, but the mean margin is not told apart from zero"),
        ({"margin": (-0.1, 0.5)}, "open Above chance, but the mean margin is not told apart from zero"),
        ({"step": 2}, "open Above chance, but 2 steps are too few to have learnt much"),
        ({"rows": 8}, "open Above chance, but 8 rows are too few to tell"),
        ({"step": 2, "logps/chosen": -110.0}, "bad Above chance, but chosen completions became 80 nats less likely; 2"),
    ],
)
def test_an_accuracy_that_misleads_is_no_good_verdict(last: dict[str, Any], verdict: str, tmp_path: Path) -> None:
    """A wrecked model, or a run that cannot have learnt anything, has an accuracy above chance as well."""
    assert _judged(tmp_path, **last).startswith(verdict)


def test_an_accuracy_that_training_did_not_make_is_no_good_verdict(tmp_path: Path) -> None:
    """On rows that were trained on; or, where nothing is compared with, as high as it was before."""
    told = {"eval": {"kept": 64, "overlap": {"rows": 3, "prompts": 3, "train_rows": 100}}}
    (tmp_path / "data.json").write_text(json.dumps(told))
    assert _judged(tmp_path) == "good Above chance"
    told["eval"]["overlap"]["rows"] = 100
    (tmp_path / "data.json").write_text(json.dumps(told))
    assert _judged(tmp_path) == "open Above chance, but 64 of its 64 rows were trained on"
    (tmp_path / "data.json").unlink()
    (tmp_path / "reference.json").write_text(json.dumps({"identity": {"meaning": "none"}}))
    assert _judged(tmp_path) == "good Above chance"
    (tmp_path / "evaluation.json").write_text("{}")
    high = {"rewards/accuracies": 1.0}
    lines = [{**STEP, "mean_token_accuracy": 0.4, **high}, {**STEP, "step": 40, **high}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {"reward_accuracy": {"value": 0.95, "low": 0.9, "high": 1.0, "n": 64}}
    (tmp_path / "evaluation.json").write_text(json.dumps(result))
    source = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Above chance, but it was 1.000 in the first log already" in source


def test_so_many_rows_tell_a_good_model_from_chance() -> None:
    """The measured basis of the limit on rows: how often an accuracy has an interval above one half, exactly."""

    def told(rows: int, accuracy: float) -> float:
        least = next(right for right in range(rows // 2, rows + 1) if wilson_interval(right, rows)[0] > 0.5)
        chances = (math.comb(rows, k) * accuracy**k * (1 - accuracy) ** (rows - k) for k in range(least, rows + 1))
        return sum(chances)

    assert all(told(rows, 0.75) > 0.8 for rows in (_FEW_ROWS - 1, _FEW_ROWS, 31, 40, 100))
    assert told(_FEW_ROWS - 2, 0.75) < 0.8
    assert max(told(rows, 0.5) for rows in range(5, 60)) < 0.04


def test_the_margins_of_held_out_pairs_are_told_and_drawn(tmp_path: Path) -> None:
    page = page_of(tmp_path / "run", pairs=PAIRS)
    assert "Of 3 of 900 held-out pairs of held_out, scored once more after training." in page.text
    assert (
        "Before training the chosen completion was the likelier one in 2, now it is in 2. Its lead over the rejected "
        "one grew in 2 and shrank in 1, by a median of +2.00 nats."
    ) in page.text
    pointers = [json.loads(value or "") for name, value in page.attributes if name == "data-pointer"]
    margins, rewards = [one for one in pointers if "to" in one["l"][0]]
    assert [line["n"] for line in margins["s"]] == ["before training", "after training"]
    assert [sum(map(int, line["t"])) for line in margins["s"]] == [3, 3]
    # beta times the changes 3, -2 and 2; the middle of each bin is that of a value.
    where = [label for label, count in zip(rewards["l"], rewards["s"][0]["t"], strict=True) if count == "1"]
    ends = [tuple(float(end.replace("\N{MINUS SIGN}", "-")) for end in label.split(" to ")) for label in where]
    assert all(low - 1e-9 <= value <= high + 1e-9 for value, (low, high) in zip([-0.2, 0.2, 0.3], ends, strict=True))


def test_tokens_are_coloured_by_the_log_ratio(tmp_path: Path) -> None:
    source = write_report(run_folder(tmp_path / "run", pairs=PAIRS)).read_text(encoding="utf-8")
    assert '<span class="u4" title="+1.50 nats">good</span><span class="n"> day</span>' in source
    assert '<span class="d2" title="−0.30 nats">bad</span>' in source
    assert "4 more tokens" in Page(source).text
    assert "Chosen less rejected: +2.00 nats, by the reference −1.00" in Page(source).text


def test_each_trouble_is_named_once_at_its_first_step(tmp_path: Path) -> None:
    lines = [{"step": step, "name": "margin-zero", "line": f"Stuck at {step}."} for step in (30, 90)]
    lines.append({"step": 1, "name": "no-loss", "line": "Normal."})
    text = page_of(tmp_path / "run", health=lines).text
    assert "Needs attentionStep 30: Stuck at 30. docs/health.md#margin-zero" in text
    assert "Stuck at 90." not in text
    assert "Normal." not in text


@pytest.mark.slow
def test_a_run_without_end_is_shown_in_two_megabytes(tmp_path: Path) -> None:
    run = full_run()
    long = "<&" * 30_000
    run["samples"] = [{"prompt": long, "before": long, "after": long}] * 400
    run["pairs"] = {
        **PAIRS,
        "shown": [{**PAIRS["shown"][0], "prompt": long, "chosen": {**SIDE, "tokens": [["<", 1.0]] * 4000}}] * 90,
    }
    run["config"] = "a: 1\n# " + "x" * 1_000_000
    run["data"] = {f"set {number}": {"rows": 1, "text": long} for number in range(9)}
    run["metrics"] = [{**STEP, "step": step, "loss": math.sin(step)} for step in range(4000)]
    path = write_report(run_folder(tmp_path / "run", **run))
    assert 100_000 < path.stat().st_size <= LARGEST_PAGE
    text = Page(path.read_text(encoding="utf-8")).text
    assert "more characters)" in text
    assert "more are in samples.json" in text


def test_a_run_that_goes_on_says_how_far_it_has_come(tmp_path: Path) -> None:
    lines = [STEP, {**STEP, "step": 40, "eval_rewards/accuracies": 0.75, "eval_rewards/margins": 0.3}]
    text = page_of(tmp_path / "run", metrics=lines).text
    assert "At step 40 the policy preferred the chosen completion in 75 % of the held-out pairs" in text
    assert "The run has not ended: the last log is of step 40." in text
    done = page_of(tmp_path / "done", metrics=[*lines, {"step": 40, "train_runtime": 9.0}]).text
    assert "has not ended" not in done
