"""`tether.trl`: arguments, parser, data and callback of TRL's scripts, held against the installed TRL."""

from __future__ import annotations

import dataclasses
import json

import pytest
from datasets import Dataset
from transformers import GenerationConfig

import tether.trl as ours
from tether import DPOConfig, DPOTrainer
from tether.errors import ConfigError
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl")
TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("name", ["ModelConfig", "ScriptArguments", "DatasetMixtureConfig"])
def test_arguments_and_defaults_are_trls(name):
    assert dataclasses.asdict(getattr(ours, name)()) == dataclasses.asdict(getattr(trl, name)())


def test_adapter_and_quantisation_are_trls():
    options = {"use_peft": True, "lora_target_modules": ["all-linear"], "use_rslora": True, "load_in_4bit": True}
    mine, theirs = ours.ModelConfig(**options), trl.ModelConfig(**options)
    assert ours.get_peft_config(mine).to_dict() == trl.get_peft_config(theirs).to_dict()
    assert ours.get_quantization_config(mine).to_dict() == trl.get_quantization_config(theirs).to_dict()
    assert (ours.get_peft_config(ours.ModelConfig()), ours.get_quantization_config(ours.ModelConfig())) == (None, None)
    with pytest.raises(ConfigError, match="load_in_8bit is True, and load_in_4bit too"):
        ours.ModelConfig(load_in_8bit=True, load_in_4bit=True)


def test_names_are_those_of_the_installed_trl_and_one_that_it_had(monkeypatch):
    """Scripts ask which version of TRL they have, and older ones where a process loads quantised weights."""
    assert ours.__version__ == trl.__version__
    assert ours.get_kbit_device_map() is None
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ours.get_kbit_device_map() == {"": 1}


def test_flags_stand_over_the_file(tmp_path, monkeypatch):
    monkeypatch.delenv("OF_THE_FILE", raising=False)
    file = tmp_path / "run.yaml"
    file.write_text("beta: 0.3\nlearning_rate: 5.0e-6\ndataset_name: x\nenv: {OF_THE_FILE: 1}\n")
    parser = ours.TrlParser((ours.ScriptArguments, DPOConfig, ours.ModelConfig))
    flags = ["--config", str(file), "--beta", "0.2", "--output_dir", str(tmp_path), "--use_cpu"]
    script, found, model = parser.parse_args_and_config(flags)
    assert (script.dataset_name, found.beta, found.learning_rate, model.lora_r) == ("x", 0.2, 5e-6, 16)
    file.write_text("betta: 0.3\n")
    with pytest.raises(ConfigError, match="options that nothing takes: --betta"):
        ours.TrlParser((DPOConfig,)).parse_args_and_config(["--config", str(file), "--output_dir", str(tmp_path)])
    given = ["--config", str(file), "--output_dir", str(tmp_path)]
    [found] = ours.TrlParser((DPOConfig,)).parse_args_and_config(given, fail_with_unknown_args=False)
    assert found.beta == DPOConfig.beta
    options = {"return_remaining_strings": True, "separate_remaining_strings": True}
    _, of_file, of_flags = ours.TrlParser((DPOConfig,)).parse_args_and_config([*given, "--x", "1"], **options)
    assert (of_file, of_flags) == (["--betta", "0.3"], ["--x", "1"])


def test_a_mixture_is_trls(tmp_path):
    for name, count in (("a", 6), ("b", 4)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name}{i}", "n": i}) + "\n" for i in range(count))
        )
    sets = [
        {"path": "json", "data_files": str(tmp_path / f"{name}.jsonl"), "columns": ["text"], "fraction": share}
        for name, share in (("a", 0.75), ("b", 0.25))
    ]
    mine = ours.get_dataset(ours.DatasetMixtureConfig(datasets=[dict(one) for one in sets]))
    theirs = trl.get_dataset(trl.DatasetMixtureConfig(datasets=[dict(one) for one in sets]))
    assert mine["train"].to_list() == theirs["train"].to_list()
    with pytest.raises(ConfigError, match="datasets is empty"):
        ours.get_dataset(ours.DatasetMixtureConfig())


def test_completions_are_those_of_the_policy(tmp_path):
    run = DPOTrainer(
        model=tiny_model(vocab_size=len(TOKENIZER), pad_token_id=0, bos_token_id=1, eos_token_id=2),
        args=DPOConfig(output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, **QUIET),
        train_dataset=Dataset.from_list(pair_rows(6)),
        eval_dataset=Dataset.from_list(pair_rows(3)),
        processing_class=TOKENIZER,
    )
    greedy = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    run.add_callback(ours.LogCompletionsCallback(run, greedy, num_prompts=2, freq=2))
    run.train()
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 2]
    assert lines[0]["prompt"] == TOKENIZER.decode(run.eval_dataset[0]["prompt_ids"])
