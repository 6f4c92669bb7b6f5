"""Scripts in the shape of TRL's own, run with TRL and, their import lines changed, with Tether: the same losses."""

from __future__ import annotations

import runpy
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers

from support.hub import write_hub

trl = pytest.importorskip("trl")
SCRIPTS = Path(__file__).parent / "files" / "scripts"
COMMON = "--max_steps 2 --logging_steps 1 --per_device_train_batch_size 12 --report_to none --bf16 False"
ARGUMENTS = {
    "dpo": "--model_name_or_path Qwen/Qwen3-0.6B --dataset_name someone/ultrafeedback_binarized --use_peft --lora_r 8 "
    "--eval_strategy steps --eval_steps 2 --no_remove_unused_columns --learning_rate 5.0e-3",
    "kto": "--model_name_or_path=trl-lib/qwen1.5-1.8b-sft --dataset_name someone/kto-mix --learning_rate 5e-3 "
    "--lr_scheduler_type=cosine --warmup_steps 0.1 --logging_first_step",
    "sft": "--model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name someone/Capybara --packing False "
    "--learning_rate 2.0e-2 --eval_strategy steps --eval_steps 2",
    "reward_modeling": "--model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name someone/ultrafeedback_binarized "
    "--gradient_checkpointing True --learning_rate 1.0e-3 --eval_strategy steps --eval_steps 2 --max_length 2048",
    "orpo": "--model_name_or_path=mistralai/Mistral-7B-v0.1 --learning_rate 8e-3 --logging_first_step "
    "--no_remove_unused_columns",
    "cpo": "--model_name_or_path=mistralai/Mistral-7B-v0.1 --learning_rate 8e-3 --loss_type simpo --cpo_alpha 0 "
    "--no_remove_unused_columns",
    "grpo": "--model_name_or_path Qwen/Qwen3-0.6B --dataset_name someone/questions --num_generations 4 "
    "--max_completion_length 8 --learning_rate 1e-3",
    "quickstart_dpo": None,
    "quickstart_peft": None,
}
# Completions are sampled by another stream of random numbers; TRL's default of bfloat16 is refused on a CPU.
ALONE = ("grpo", "quickstart_dpo")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data sets by their hub names."""
    folder = tmp_path_factory.mktemp("hub")
    write_hub(folder)
    return folder


def losses(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, ours: bool) -> list[float]:
    """The losses that a script logs: of each step, or of the whole run."""
    text = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
    if ours:
        text = text.replace("from trl", "from tether.trl")
    output = folder / "out" / ("ours" if ours else "theirs")
    file = folder / f"{name}.py"
    file.write_text(text, encoding="utf-8")
    flags = ARGUMENTS[name]
    given = [] if flags is None else [*flags.split(), *COMMON.split(), "--output_dir", str(output)]
    monkeypatch.setattr(sys, "argv", [str(file), *given])
    logged: list[dict[str, Any]] = []
    plain = transformers.Trainer.log
    monkeypatch.setattr(
        transformers.Trainer, "log", lambda self, logs, *more: (logged.append(dict(logs)), plain(self, logs, *more))[1]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(file), run_name="__main__")
    monkeypatch.setattr(transformers.Trainer, "log", plain)
    shutil.rmtree(folder / "trainer_output", ignore_errors=True)
    return [entry[key] for entry in logged for key in ("loss", "train_loss", "eval_loss") if key in entry]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_script_trains_as_with_trl(name: str, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(hub / "cache"))
    shutil.rmtree(hub / "out", ignore_errors=True)
    mine = losses(name, hub, monkeypatch, ours=True)
    assert len(mine) >= 1
    if name in ALONE:
        return
    theirs = losses(name, hub, monkeypatch, ours=False)
    assert mine == pytest.approx(theirs, abs=2e-4, rel=2e-4)


def test_every_script_is_run() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.py")} == ARGUMENTS.keys()
    assert len(ARGUMENTS) >= 8
