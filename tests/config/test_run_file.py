"""Run files: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tether.config import RunConfig, check_run, json_schema, load_run_file
from tether.config.document import parse, write_document
from tether.config.sections import ADAPTERS
from tether.errors import ConfigError

SMALLEST = "model: tiny\ndata: {train: pairs.jsonl}\n"
Load = Callable[..., RunConfig]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Write a run file to `run.yaml` in the current folder and read it."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, *overrides: str) -> RunConfig:
        Path("run.yaml").write_text(text, encoding="utf-8")
        return load_run_file("run.yaml", overrides)

    return load


def test_the_smallest_run_file_has_every_default(load: Load) -> None:
    assert load(SMALLEST).to_dict() == {
        "model": {
            "name": "tiny",
            "dtype": "auto",
            "revision": None,
            "quantization": None,
            "device": None,
            "attention": None,
            "trust_remote_code": False,
            "tokenizer": None,
            "adapter": None,
            "processor": None,
            "add_tokens": None,
            "chat_template": None,
            "special_tokens": None,
            "train": None,
            "freeze": None,
        },
        "lora": None,
        "peft": None,
        "data": {
            "train": "pairs.jsonl",
            "eval": None,
            "check": None,
            "cache": "auto",
            "streaming": False,
            "buffer_size": 1000,
            "system": None,
            "chat_template_kwargs": None,
            "images": None,
            "deduplicate": False,
        },
        "reference": {
            "meaning": "start",
            "model": None,
            "revision": None,
            "dtype": None,
            "quantization": None,
            "device": None,
            "attention": None,
            "trust_remote_code": None,
            "adapter": None,
            "method": None,
            "snapshot": None,
            "sync": None,
            "remote": None,
            "store": None,
            "store_dtype": "float32",
        },
        "objective": {
            "loss": "sigmoid",
            "weights": None,
            "beta": 0.1,
            "label_smoothing": 0.0,
            "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": None,
            "ld_alpha": None,
            "use_weighting": False,
            "discopop_tau": 0.05,
            "dpop_lambda": 50.0,
            "tdpo_alpha": 0.5,
            "rpo_eta": 1.0,
            "simpo_gamma": 0.5,
            "cpo_alpha": 1.0,
        },
        "rewards": None,
        "rollout": None,
        "train": {"epochs": 3.0, "learning_rate": 1e-6, "batch_size": 8, "max_length": 1024, "max_steps": -1},
        "callbacks": None,
        "env": None,
        "output": "runs/run",
    }


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("train: {learning_rate: 5e-6}", "train.learning_rate", 5e-6),
        ("train: {learning_rate: 1E+2}", "train.learning_rate", 100.0),
        ("train: {learning_rate: 1}", "train.learning_rate", 1.0),
        ("train: {num_train_epochs: 2}", "train.epochs", 2.0),
        ("train: {max_length: null}", "train.max_length", None),
        ("train: {eval_strategy: no}", "train.eval_strategy", "no"),
        ("train: {run_name: 1:30}", "train.run_name", "1:30"),
        ("train: {seed: 010}", "train.seed", 10),
        ("train: {warmup_steps: 0.1, weight_decay: 0}", "train.warmup_steps", 0.1),
        ("lora: {}", "lora.r", 16),
        ("lora: {target: [q_proj, v_proj]}", "lora.target", ["q_proj", "v_proj"]),
        ("lora: {init: pissa_niter_4}", "lora.init", "pissa_niter_4"),
        ("reference: base", "reference.meaning", "base"),
        ("reference: {model: other}", "reference.meaning", "model"),
        ("reference: {method: snapshot}", "reference.method", "snapshot"),
    ],
)
def test_what_is_written_is_what_is_meant(load: Load, text: str, path: str, value: Any) -> None:
    found: Any = load(SMALLEST + text).to_dict()
    for part in path.split("."):
        found = found[part]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train: {batch_siez: 3}",
            "run.yaml, line 3: `train.batch_siez` is not known. Did you mean `train.batch_size`?",
        ),
        ("train: {logging_step: 3}", "`train.logging_step` is not known. Did you mean `train.logging_steps`?"),
        ("lorra: {}", "`lorra` is not known. Did you mean `lora`?"),
        ("lora:\n  alhpa: 3", "run.yaml, line 4: `lora.alhpa` is not known. Did you mean `lora.alpha`?"),
        ("batch_size: 3", "`batch_size` is not known. It belongs in `train.batch_size`."),
        ("save_steps: 3", "`save_steps` is not known. It belongs in `train.save_steps`."),
        ("objective: {zeta: 3}", "`objective.zeta` is not known. Did you mean `objective.beta`?"),
        (
            "objective: {x: 3}",
            "`objective.x` is not known. Allowed are loss, weights, beta, label_smoothing, f_divergence_type,",
        ),
        ("train: {beta: 0.2}", "`train.beta` is said by `objective.beta` in a run file."),
        ("train: {output_dir: x}", "`train.output_dir` is said by `output` in a run file."),
        (
            "train: {local_rank: 0}",
            "`train.local_rank` is said by the launcher (torchrun or accelerate) in a run file.",
        ),
        (
            "train: {batch_size: '32'}",
            "`train.batch_size` is '32' (text); allowed is a whole number from 1. Take the quotes away.",
        ),
        (
            "train: {batch_size: 2.5}",
            "`train.batch_size` is 2.5 (a number with a fraction); allowed is a whole number from 1.",
        ),
        ("train: {batch_size: true}", "`train.batch_size` is true (a switch); allowed is a whole number from 1."),
        ("train: {batch_size: 0}", "`train.batch_size` is 0 (a whole number); allowed is a whole number from 1."),
        ("train: {learning_rate: .nan}", "`train.learning_rate` is nan"),
        ("train: {learning_rate: fast}", "`train.learning_rate` is 'fast' (text); allowed is a number from 0"),
        ("train: {max_steps: 0}", "`max_steps` is 0; allowed is a whole number from 1, or -1 for no limit"),
        ("train: {epochs: 1, num_train_epochs: 2}", "`epochs` and `num_train_epochs` are two names of one thing"),
        ("train: {warmup_steps: abc}", "`train.warmup_steps` is 'abc' (text); allowed is a number."),
        ("train: {save_steps: -4}", "`train.save_steps` is -4 (a whole number); allowed is a number, from 0 on."),
        (
            "train: {gradient_checkpointing: yes}",
            "`train.gradient_checkpointing` is 'yes' (text); allowed is true or false",
        ),
        ("train: {eval_strategy: stps}", "'stps' (text); allowed is no, steps, epoch (did you mean steps?)."),
        ("train: {optim: adam}", "(did you mean adamw_torch?)."),
        ("train: {optim_target_modules: 3}", "is 3 (a whole number); allowed is null or text or a list."),
        ("train: {parallelism_config: 3}", "`train.parallelism_config` is 3 (a whole number); allowed is a mapping or"),
        ("lora: true", "`lora` is true (a switch); allowed is a mapping with the keys r, alpha, target"),
        ("lora: {target: []}", "`lora.target` is [] (a list); allowed is all-linear, or a list of module names"),
        ("lora: {init: eva}", "`lora.init` is 'eva' (text); allowed is true, false, gaussian"),
        (
            "reference: frozen",
            "`reference.meaning` is 'frozen' (text); allowed is start, base, none, {model: name} or {adapter",
        ),
        ("reference: [base]", "`reference` is ['base'] (a list); allowed is start, base, none, {model: name} or"),
        ("reference: {adapter: sft, model: x}", "its meaning is model and its adapter is sft"),
        ("reference: {meaning: start, dtype: float32}", "`dtype` is of another model, and none is named"),
        ("reference: {sync: {alpha: 2}}", "`reference.sync.alpha` is 2 (a whole number); allowed is a number above 0"),
        ("reference: {remote: {url: nowhere}}", "allowed is an address that begins with http"),
        ("reference: {model: x, remote: {url: 'http://h'}}", "and not beside `remote`"),
        ("reference: {meaning: model}", "its meaning is model and its model is null"),
        ("reference: {meaning: start, model: x}", "its meaning is start and its model is x"),
        ("output: 3", "`output` is 3 (a whole number); allowed is text."),
        ("model: other", "run.yaml, line 3: `model` was given before, on line 1. Keep one of the two."),
        ("1: 2", "run.yaml, line 3: the key `1` is not text."),
        (
            "lora: {r: 0, bias: 1}",
            "`lora.r` is 0 (a whole number); allowed is a whole number from 1. run.yaml, line 3: `lora.bias`",
        ),
        ("lora: {r: 0, bias: 1, dora: 2, rslora: 3, dropout: 4}", "There are 2 further problems."),
        ("lora: {r: 0, bias: 1, dora: 2, rslora: 3}", "There is one more."),
        ("lora: {target_parameters: []}", "`lora.target_parameters` is [] (a list); allowed is a list of parameter"),
        ("lora: {use_dora: true}", "`lora.use_dora` is not known. It is called `lora.dora` here."),
        ("load_in_4bit: true", "`load_in_4bit` is not known. It is called `model.quantization: 4bit` here."),
        ("peft: {}", "`peft.type` is missing. Name the kind of adapter: lora, vera, ia3"),
        ("peft: {type: verra}", "`peft.type` is 'verra' (text); allowed is lora, vera, ia3"),
        (
            "peft: {type: vera, target_modulse: [q_proj]}",
            "run.yaml, line 3: `peft.target_modulse` is not known. Did you mean `peft.target_modules`?",
        ),
        ("peft: {type: vera, lora_alpha: 3}", "`peft.lora_alpha` is not known."),
        ("peft: {type: vera, r: '2'}", "`peft.r` is '2' (text); allowed is a whole number. Take the quotes away."),
        ("peft: {type: lora, init_lora_weights: eva}", "allowed is gaussian, orthogonal, olora, pissa"),
        ("peft: {type: prompt, tokenizer_kwargs: {trust_remote_code: true}}", "`peft.tokenizer_kwargs` is not known."),
        ("lora: {}\npeft: {type: ia3}", "`lora` and `peft` are two new adapters; leave one of them out"),
        ("train: {add_tokens: [x]}", "`train.add_tokens` is said by `model.add_tokens` in a run file."),
        ("train: {train_parameters: [x]}", "`train.train_parameters` is said by `model.train` in a run file."),
        ("train: {freeze_parameters: [x]}", "`train.freeze_parameters` is said by `model.freeze` in a run file."),
        ("reference: {model: x, quantization: 3bit}", "allowed is 4bit (the same as nf4), 8bit, int8, none or null"),
    ],
)
def test_what_is_wrong_is_said_in_one_paragraph(load: Load, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(SMALLEST + text)
    assert message in str(caught.value)
    assert str(caught.value).startswith("run.yaml")
    assert "\n" not in str(caught.value)


# A kilobyte that stands for half a billion values.
UNFOLDING = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.yaml holds nothing"),
        ("- model", "run.yaml holds a list"),
        ("data: {train: x}", "run.yaml: `model` is missing. Name the policy"),
        (
            "model: x\ndata:",
            "run.yaml, line 2: `data` is empty (null); allowed is a mapping with the keys train, eval, check, images, "
            "cache, streaming, buffer_size, system, chat_template_kwargs, deduplicate.",
        ),
        ("model: x\ndata: {}", "run.yaml, line 2: `data.train` is missing."),
        ("model: x\ndata: {train: []}", "`data.train` is [] (a list); allowed is a path, a glob or a hub name"),
        ("model: x\ndata:\n\ttrain: y", "run.yaml, line 3, column 1: there is a tab. YAML is indented with spaces"),
        ("model: x\ndata: [y", "run.yaml, line 2, column 9: this is not YAML: expected ',' or ']'"),
        (
            "model: !!python/name:os.system x",
            "run.yaml, line 1, column 8: the tag 'tag:yaml.org,2002:python/name:os.system' is not read",
        ),
        ("model: &a [*a]", "run.yaml, line 1: `model.0` contains itself."),
        (UNFOLDING, "run.yaml has more than 100,000 values, as aliases (`*name`) of aliases unfold to."),
        ("train: {max_steps: " + "1" * 5000 + "}", "expected a whole number of at most 100 digits, got one of 5000"),
        ("model: x\0", "run.yaml is not YAML: unacceptable character"),
    ],
)
def test_what_is_no_run_file_is_said(load: Load, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert message in str(caught.value)


def test_a_missing_run_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(SMALLEST)
    with pytest.raises(ConfigError, match=r"rum\.yaml' does not exist\. Did you mean '.*/run\.yaml'"):
        load_run_file(tmp_path / "rum.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_run_file(tmp_path)
    (tmp_path / "run.yaml").write_bytes(b"model: \xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_run_file(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("", ["train.learning_rate=1e-5"], {"train": {"learning_rate": 1e-5}}),
        ("", ["train.num_train_epochs=2"], {"train": {"epochs": 2.0}}),
        ("", ["lora.r=8"], {"lora": {"r": 8}}),
        ("lora: {r: 4, alpha: 8}", ["lora.r=8"], {"lora": {"r": 8, "alpha": 8.0}}),
        ("lora: {r: 4}", ["lora=null"], {"lora": None}),
        ("lora: {r: 4, alpha: 8}", ["lora={r: 2}"], {"lora": {"r": 2, "alpha": 32.0}}),
        ("", ["model.dtype=float32"], {"model": {"name": "tiny", "dtype": "float32"}}),
        ("", ["model=other"], {"model": {"name": "other"}}),
        ("reference: base", ["reference.method=snapshot"], {"reference": {"meaning": "base", "method": "snapshot"}}),
        ("", ["data.eval={a: x, b: [y, z]}"], {"data": {"eval": {"a": "x", "b": ["y", "z"]}}}),
        ("", ["output=a", "output=b=c"], {"output": "b=c"}),
    ],
)
def test_overrides(load: Load, text: str, overrides: list[str], expected: dict[str, Any]) -> None:
    found = load(SMALLEST + text, *overrides).to_dict()
    for section, keys in expected.items():
        if isinstance(keys, dict):
            assert {name: found[section][name] for name in keys} == keys
        else:
            assert found[section] == keys


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rank=8", "override 'lora.rank=8': `lora.rank` is not known."),
        ("train.batch_size=many", "override 'train.batch_size=many': `train.batch_size` is 'many' (text)"),
        ("train.logging_step=1", "override 'train.logging_step=1': `train.logging_step` is not known."),
        ("train", "The argument 'train' is not an override. Allowed is key=value"),
        ("=3", "The argument '=3' is not an override."),
        ("train..x=3", "is not an override."),
        ("train=3", "`train` is 3 (a whole number); allowed is a mapping"),
        ("data.train.x=3", "goes into `data.train`, which is 'pairs.jsonl' (text) and no mapping."),
        ("train.learning_rate=[", "override 'train.learning_rate=[', line 1, column 2: this is not YAML"),
    ],
)
def test_a_wrong_override_is_named(load: Load, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(SMALLEST, override)
    assert message in str(caught.value)


def test_the_resolved_file_gives_the_same_run(load: Load) -> None:
    text = SMALLEST + "lora: {target: [q_proj]}\ntrain: {run_name: '1e-5', eval_strategy: 'no', learning_rate: 5e-6}\n"
    run = load(text, "reference.method=snapshot")
    again = load(run.dump_yaml())
    assert again.to_dict() == run.to_dict()


@pytest.mark.parametrize(
    "value", [5e-6, "5e-6", 10, "010", True, "true", "no", None, "null", "", "1:30", "ü", [1, {"a": "~"}]]
)
def test_yaml_written_is_read_back(value: Any) -> None:
    assert parse(write_document({"key": value}), "text")[0] == {"key": value}


def test_merge_keys_are_understood() -> None:
    assert parse("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", "text")[0] == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


def test_contents_can_be_checked_without_a_file() -> None:
    assert check_run({"model": "tiny", "data": {"train": "x"}}).model.name == "tiny"
    with pytest.raises(ConfigError, match="run: `model` is missing"):
        check_run({"data": {"train": "x"}})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "{name: x, quantization: 2bit}",
            "`model.quantization` is '2bit' (text); allowed is 4bit (the same as nf4), 8bit",
        ),
        ("{name: x, quantisation: 4bit}", "`model.quantisation` is not known. Did you mean `model.quantization`?"),
        ("{name: x, attn_implementation: sdpa}", "is not known. It is called `model.attention` here."),
        ("{name: x, device_map: auto}", "`model.device_map` is not known. Did you mean `model.device`?"),
        (
            "{name: x, device: 0}",
            "`model.device` is 0 (a whole number); allowed is cpu, cuda, cuda:1 or another device",
        ),
        ("{name: x, add_tokens: token}", "`model.add_tokens` is 'token' (text); allowed is a list of tokens, or null"),
        ("{name: x, train: []}", "`model.train` is [] (a list); allowed is a list of regular expressions, or null"),
        ("{name: x, trust_remote_code: yes}", "`model.trust_remote_code` is 'yes' (text); allowed is true or false"),
        ("{quantization: 4bit}", "`model.name` is missing."),
    ],
)
def test_what_is_wrong_with_a_model_is_said_at_its_key(load: Load, model: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"model: {model}\ndata: {{train: x}}\n")
    assert message in str(caught.value)


def test_the_json_schema_has_each_kind_of_adapter() -> None:
    """By PEFT's own names, without what a run file cannot say."""
    kinds = {branch["properties"]["type"]["const"]: branch for branch in json_schema()["$defs"]["Peft"]["oneOf"]}
    assert set(kinds) == set(ADAPTERS)
    assert kinds["vera"]["properties"]["r"] == {"type": "integer"}
    assert kinds["vera"]["additionalProperties"] is False
    assert "prompt_tuning_init" in kinds["prompt"]["properties"]
    for kind in kinds.values():
        assert not {"base_model_name_or_path", "inference_mode", "task_type", "loftq_config"} & set(kind["properties"])


def test_the_json_schema_knows_every_key() -> None:
    schema = json_schema()
    json.dumps(schema)
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert schema["required"] == ["model", "data"]
    train = schema["$defs"]["Train"]
    assert {"epochs", "batch_size", "logging_steps", "disable_dropout"} <= set(train["properties"])
    assert train["additionalProperties"] is False
    assert train["properties"]["eval_strategy"]["enum"] == ["no", "steps", "epoch"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": {"path": "a", "formt": "x"}}, "`data.train.formt` is not known. Did you mean `data.train.format`?"),
        ({"train": [{"path": "a", "weight": -1}]}, "`data.train.0.weight` is -1 .* allowed is a number above 0"),
        (
            {"train": {"path": "a"}, "eval": {"split": 0.1, "by": "z"}},
            "`data.eval.by` is 'z' .* allowed is prompt or row",
        ),
        ({"train": "a", "eval": {"x": {"path": 1}}}, "`data.eval.x.path` is 1"),
        ({"train": {"path": "a", "fields": {"prompt": 3}}}, "`data.train.fields.prompt` is 3"),
        ({"train": {"split": 0.1}}, "`data.train` is {'split': 0.1}"),
    ],
)
def test_what_is_wrong_with_a_source_is_said_at_its_key(data: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_run({"model": "m", "data": data})


def test_sources_reach_the_trainer_as_they_were_written() -> None:
    train = [{"path": "a.jsonl", "format": "hh", "fields": {"prompt": "q"}, "weight": 0.5}, "b.jsonl"]
    run = check_run({"model": "m", "data": {"train": train, "eval": {"split": 0.05}}})
    assert run.data.train_rows == train
    assert run.data.eval_rows == {"split": 0.05}
    assert check_run(run.to_dict()) == run
