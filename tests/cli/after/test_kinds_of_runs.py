"""Runs of every kind are named, evaluated as they were trained, and merged or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cli.after.runs import Run
from tether.cli.main import main
from tether.config.model_names import named_model
from tiny import tiny_model

EVAL = ("eval", "out", "--data", "held_out.jsonl", "--json")
Ask = Callable[..., Any]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Trains a run, and gives it with what calls a command in its folder and reads its JSON or its error."""

    def _trained(*overrides: str) -> tuple[Run, Ask]:
        run = Run(tmp_path, "train.max_steps=3", *overrides)
        monkeypatch.chdir(tmp_path)

        def ask(*arguments: str, code: int = 0) -> Any:
            capsys.readouterr()
            found = main(list(arguments))
            out, err = capsys.readouterr()
            assert found == code, out + err
            return err if code else json.loads(out)

        return run, ask

    return _trained


@pytest.mark.parametrize(
    "overrides",
    [
        ("lora=null",),
        ("objective={loss: simpo}",),
        ("objective={loss: orpo}",),
        ("objective={loss: ipo, beta: 0.3}",),
        ("lora=null", "reference.sync={steps: 2, alpha: 0.5}"),
        ("reference.sync={steps: 2, alpha: 0.5}",),
        ("lora={r: 4, alpha: 8, init: pissa}",),
        ("model.add_tokens=[QQ]",),
    ],
    ids=lambda overrides: " ".join(overrides),
)
@pytest.mark.sweep(1)
def test_evaluated_as_it_was_trained(trained: Any, overrides: tuple[str, ...]) -> None:
    run, ask = trained(*overrides)
    found, logged = ask(*EVAL), run.metrics()
    assert found["overall"]["accuracy"][0] == pytest.approx(logged["eval_rewards/accuracies"])
    assert found["overall"]["margin"][0] == pytest.approx(logged["eval_rewards/margins"], abs=2e-5)
    assert found["chosen"][0] == pytest.approx(logged["eval_rewards/chosen"], abs=2e-5)
    assert found["proved"] is not False


def test_a_reward_model_is_evaluated_and_merged(trained: Any) -> None:
    run, ask = trained("objective={loss: reward}")
    found = ask(*EVAL)
    assert found["reference"] is None
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    logged = next(line for line in reversed(lines) if "eval_accuracy" in line)
    assert found["overall"]["accuracy"][0] == pytest.approx(logged["eval_accuracy"])
    merged = ask("merge", "out", "--output", "whole", "--json")
    assert merged["unit"] == "of a reward"
    assert merged["effect"] > 100 * merged["loaded"]
    whole = ask("eval", "whole", "--data", "held_out.jsonl", "--json")
    assert whole["overall"]["margin"][0] == pytest.approx(found["overall"]["margin"][0], abs=1e-5)
    assert "writes nothing" in ask("chat", "out", code=2)


def test_a_run_without_a_configuration_is_its_model_and_its_record(trained: Any) -> None:
    run, ask = trained()
    whole = ask(*EVAL)
    (run.out / "config.yaml").unlink()
    found = ask(*EVAL)
    assert found["proved"] is True
    assert "as no run says another" in found["rule"]
    assert found["overall"]["margin"][0] == pytest.approx(whole["overall"]["margin"][0], abs=1e-6)


def test_a_run_that_was_stopped_is_its_last_checkpoint(trained: Any) -> None:
    run, ask = trained()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (run.out / name).unlink()
    assert named_model("out").source == str(Path("out") / "checkpoint-3")
    weights = run.out / "checkpoint-3" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "neither a final model nor a whole checkpoint" in ask("eval", "out", "--data", "held_out.jsonl", code=2)
    assert "adapter_model.safetensors" in ask("eval", "out/checkpoint-3", "--data", "held_out.jsonl", code=2)


@pytest.mark.slow
def test_a_stack_is_merged_with_all_that_is_active(trained: Any) -> None:
    run, ask = trained()
    run.out.rename(run.path / "first")
    over = ("model={name: model, adapter: first}", "reference=start", "train.max_steps=3")
    assert main(["train", "run.yaml", *over, "train.learning_rate=0.02"]) == 0
    merged = ask("merge", "out", "--output", "whole", "--data", "held_out.jsonl", "--json")
    assert len(merged["adapters"]) == 2
    assert merged["loaded"] < 1e-5 < merged["effect"]
    base = AutoModelForCausalLM.from_pretrained("model")
    first = PeftModel.from_pretrained(base, "first").eval()
    whole = AutoModelForCausalLM.from_pretrained("whole").eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        # Not the first adapter alone.
        assert (first(ids).logits - whole(ids).logits).abs().max() > 1e-2


# PEFT warns of what is tested here.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_tied_weights_that_an_adapter_writes_into_are_untied(trained: Any) -> None:
    run, ask = trained("train.max_steps=1")
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(run.path / "model")
    lora = "lora={r: 4, alpha: 8, target: [lm_head, q_proj]}"
    assert main(["train", "run.yaml", lora, "train.max_steps=2", "output=tied"]) == 0
    merged = ask("merge", "tied", "--output", "whole", "--json")
    assert merged["loaded"] < 1e-5 < merged["effect"]
    whole = AutoModelForCausalLM.from_pretrained("whole")
    assert whole.config.tie_word_embeddings is False
    kept, before = (one.state_dict()["model.embed_tokens.weight"] for one in (whole, model))
    assert torch.equal(kept, before)


def test_virtual_tokens_cannot_be_merged(trained: Any) -> None:
    _, ask = trained("lora=null", "peft={type: prompt, num_virtual_tokens: 4}", "train.max_steps=1")
    assert "virtual tokens" in ask("merge", "out", "--output", "whole", code=2)
    assert not Path("whole").exists()
    assert "only LoRA is read" in json.dumps(ask("export", "out", "--json"))


@pytest.mark.slow
def test_merged_in_fewer_bits_says_so(trained: Any) -> None:
    _, ask = trained("train.max_steps=2")
    merged = ask("merge", "out", "--output", "whole", "--dtype", "bfloat16", "--json")
    assert (merged["trained_dtype"], merged["dtype"]) == ("float32", "bfloat16")
    assert merged["merged"] < 1e-5 < merged["loaded"]
    assert AutoModelForCausalLM.from_pretrained("whole").dtype == torch.bfloat16


@pytest.mark.slow
def test_a_moved_reference_that_no_checkpoint_holds_is_refused(trained: Any) -> None:
    _, ask = trained("reference.sync={steps: 2, alpha: 0.5}", "train.save_strategy='no'", "train.max_steps=3")
    assert "no checkpoint of the last step" in ask(*EVAL[:-1], code=1)
