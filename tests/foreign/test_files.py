"""Files in the shape of each tool's own examples: converted, trained two steps, the first loss held against TRL's."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from support.hub import COUNT, questions, said, talk, write_hub
from tether.cli.run import make_trainer, train_and_evaluate
from tether.config import load_run_file
from tether.config.foreign import Conversion, convert_file
from tether.config.foreign.write import run_file_text
from tether.errors import ConfigError

trl = pytest.importorskip("trl")
FILES = Path(__file__).parent / "files"
Rows = list[dict[str, Any]]
# Two steps over all rows at once, in each tool's words.
SHORT = {
    "axolotl": ["micro_batch_size=100", "gradient_accumulation_steps=1", "val_set_size=0", "output_dir=out"],
    "llamafactory": [
        "per_device_train_batch_size=100",
        "gradient_accumulation_steps=1",
        "val_size=0",
        "output_dir=out",
    ],
    "llamafactory_v1": ["micro_batch_size=12", "global_batch_size=12", "bf16=false", "output_dir=out"],
    "trl": ["per_device_train_batch_size=100", "gradient_accumulation_steps=1", "output_dir=out"],
}
PLAIN = {"load_in_4bit": "false", "load_in_8bit": "false", "quantization_bit": "null"}


def pairs(system: str | None = None) -> Rows:
    """The questions as pairs of conversations."""
    head = [said("system", system)] if system else []
    return [
        {"prompt": head + talk(q), "chosen": [said("assistant", a)], "rejected": [said("assistant", b)]}
        for q, a, b in questions()
    ]


def doubled() -> Rows:
    """The pairs, and the same with another question."""
    more = [{**row, "prompt": [said("user", row["prompt"][0]["content"] + "?")]} for row in pairs()]
    return [*pairs(), *more]


def labelled() -> Rows:
    """Every second question with its good answer, the others with the bad one."""
    return [
        {"prompt": talk(q), "completion": [said("assistant", (a, b)[n % 2])], "label": n % 2 == 0}
        for n, (q, a, b) in enumerate(questions())
    ]


def worded() -> Rows:
    """Labelled answers as text, by a pattern."""
    return [
        {"prompt": f"Question: {q}\nAnswer:", "completion": f" {(a, b)[n % 2]}", "label": n % 2 == 0}
        for n, (q, a, b) in enumerate(questions())
    ]


def instructions() -> Rows:
    """Pairs of text in the wording of Mistral's instructions."""
    return [
        {"prompt": f"<s>[INST] Be brief. {q} [/INST]", "chosen": f"{a}</s>", "rejected": f"{b}</s>"}
        for q, a, b in questions()
    ]


def own() -> Rows:
    """Pairs of text, by patterns."""
    return [{"prompt": f"<s>Be brief. {q}", "chosen": f" {a}</s>", "rejected": f" {b}</s>"} for q, a, b in questions()]


def alpaca() -> Rows:
    """Instructions in Stanford Alpaca's wording."""
    task = "Below is an instruction that describes a task"
    end = "Write a response that appropriately completes the request.\n\n"
    further = f"{task}, paired with an input that provides further context. {end}"
    return [
        {
            "prompt": f"{task}. {end}### Instruction:\n{q}\n\n### Response:\n"
            if n % 2
            else f"{further}### Instruction:\n{q}\n\n### Input:\na film\n\n### Response:\n",
            "completion": a,
        }
        for n, (q, a, _) in enumerate(questions())
    ]


def instructed() -> Rows:
    """Instructions as conversations, and the one of LLaMA-Factory's identity."""
    asked = [(q if n % 2 else f"{q}\na film", a) for n, (q, a, _) in enumerate(questions())]
    rows = [("hi", "Hello! I am {{name}}."), *asked]
    return [{"prompt": talk(q), "completion": [said("assistant", a)]} for q, a in rows]


def mixed() -> Rows:
    """Twelve instructions, and a quarter as many times the one of LLaMA-Factory's identity."""
    hello, *asked = instructed()
    return [*asked, *[hello] * 3]


def turns(count: int = 12) -> Rows:
    """Both turns of every conversation, each with what was said before it: the same tokens as those of the whole."""
    found: Rows = []
    for q, good, bad in questions()[:count]:
        found.append({"prompt": talk(q), "completion": [said("assistant", bad)]})
        found.append({"prompt": [*talk(q, bad), said("user", "And now?")], "completion": [said("assistant", good)]})
    return found


def last_turns() -> Rows:
    """The last turn of every conversation."""
    return turns()[1::2]


def chats() -> Rows:
    """Whole conversations, of which every token is trained on."""
    return [{"messages": [*talk(q, b), *talk("And now?", a)]} for q, a, b in questions()]


def reviews() -> Rows:
    """Plain text."""
    return [{"text": f"{q} {a}."} for q, a, _ in questions()]


@dataclass(frozen=True)
class Case:
    """A file, and what TRL would train with on it.

    Args:
        file: below `files`.
        more: overrides that the file needs here, beside those of `SHORT`.
        trainer: TRL's; empty where TRL cannot run it.
        rows: TRL's columns.
        options: of TRL's configuration.
        command: TRL's, of a file of TRL.
        slow: not in the ordinary suite.
    """

    file: str
    more: tuple[str, ...] = ()
    trainer: str = ""
    rows: Callable[[], Rows] = pairs
    options: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    slow: bool = True

    @property
    def tool(self) -> str:
        """The tool that the file is for."""
        return self.file.split("/")[0]


CASES = [
    Case("axolotl/llama3-dpo-lora.yml", trainer="DPO", slow=False),
    Case("axolotl/llama3-dpo-deduplicate.yml", trainer="DPO"),
    Case("axolotl/qwen2-dpo-full.yaml", trainer="DPO"),
    Case("axolotl/mistral-dpo-qlora.yml", trainer="DPO"),
    Case("axolotl/mistral-dpo-older.yml", ("fp16=false", "device_map=null", "sequence_len=128"), trainer="DPO"),
    Case("axolotl/mistral-orpo-qlora.yml", trainer="ORPO", options={"beta": 0.1}),
    Case(
        "axolotl/llama3-kto-qlora.yaml",
        trainer="KTO",
        rows=lambda: [{**row, "prompt": [said("system", "Be brief."), *row["prompt"]]} for row in labelled()],
        options={"beta": 0.5, "desirable_weight": 0.2},
    ),
    Case("axolotl/kto-user-defined.yaml", trainer="KTO", rows=worded, options={"beta": 0.1}),
    Case("axolotl/qwen2-reward-model.yaml"),
    Case(
        "axolotl/gemma2-reward-model.yaml",
        trainer="Reward",
        options={"center_rewards_coefficient": 0.01},
    ),
    Case(
        "axolotl/llama3-dpo-intel.yml",
        ("wandb_project=null",),
        trainer="DPO",
        rows=lambda: pairs("Be brief."),
    ),
    Case(
        "axolotl/llama3-simpo.yaml",
        trainer="CPO",
        options={"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.1, "simpo_gamma": 0.8},
    ),
    Case("axolotl/llama-dpo-fsdp2.yaml", trainer="DPO"),
    Case("axolotl/llama3-sft-alpaca.yaml", trainer="SFT", rows=alpaca),
    Case("axolotl/llama3-sft-lora-plus.yml", trainer="SFT", rows=alpaca),
    Case(
        "axolotl/qwen3-sft-conversations.yaml",
        ("chat_template=tokenizer_default",),
        trainer="SFT",
        rows=lambda: turns(6),
    ),
    Case("axolotl/llama3-sft-chat.yml", trainer="SFT", rows=turns),
    Case("axolotl/phi3-dpo-lora.yaml", trainer="DPO"),
    Case(
        "axolotl/ipo-user-defined.yaml",
        ("use_tensorboard=false",),
        trainer="DPO",
        rows=instructions,
        options={"loss_type": "ipo", "beta": 0.1},
    ),
    Case("axolotl/dpo-user-defined.yaml", trainer="DPO", rows=own, options={"loss_type": "ipo", "beta": 0.2}),
    Case(
        "axolotl/llama3-grpo.yaml",
        ("datasets.0.name=null", "micro_batch_size=10", "save_steps=null"),
    ),
    Case("axolotl/llava-sft-images.yaml", ("optimizer=adamw_torch", "tf32=false")),
    Case("axolotl/mixtral-qlora.yml", trainer="SFT", rows=alpaca),
    Case("axolotl/jamba-sft-swanlab.yaml", trainer="SFT", rows=lambda: turns(12)),
    Case("llamafactory/lora_dpo.yaml", trainer="DPO"),
    Case("llamafactory/lora_sft_images.yaml"),
    Case("llamafactory/full_sft_mixed.yaml", trainer="SFT", rows=mixed),
    Case("llamafactory/oft_dpo.yaml", trainer="DPO"),
    Case("llamafactory/lora_sft_tools.yaml"),
    Case("llamafactory/lora_kto.yaml", trainer="KTO", rows=labelled),
    Case("llamafactory/lora_reward.yaml"),
    Case("llamafactory/lora_sft_ds3.yaml", trainer="SFT", rows=instructed),
    Case("llamafactory/full_sft_ds3.yaml", trainer="SFT", rows=instructed),
    Case("llamafactory/lora_dpo_images.yaml"),
    Case("llamafactory/qlora_sft.yaml", trainer="SFT", rows=instructed),
    Case("llamafactory/full_sft_dft.yaml", trainer="SFT", rows=instructed, options={"loss_type": "dft"}),
    Case("llamafactory/lora_plus_sft.yaml", trainer="SFT", rows=instructed),
    Case("llamafactory/lora_pissa_sft.yaml", trainer="SFT", rows=last_turns),
    Case(
        "llamafactory/lora_dpo_second.yaml",
        ("adapter_name_or_path=null",),
        trainer="DPO",
        options={"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    ),
    Case(
        "llamafactory/freeze_simpo.yaml",
        trainer="CPO",
        options={"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0, "simpo_gamma": 1.0},
    ),
    Case(
        "llamafactory_v1/lora_dpo.yaml",
        trainer="DPO",
        rows=lambda: [
            {"prompt": talk(f"{q} "), "chosen": [said("assistant", a)], "rejected": [said("assistant", b)]}
            for q, a, b in questions()
        ],
    ),
    Case("llamafactory_v1/full_sft_images.yaml"),
    Case("trl/dpo_zephyr.yaml", trainer="DPO", command="dpo"),
    Case(
        "trl/dpo_zephyr_gemma.yaml",
        ("max_prompt_length=null", "push_to_hub=false", "hub_model_id=null", "report_to=none"),
        trainer="DPO",
        command="dpo",
    ),
    Case(
        "trl/dpo_mixture.yaml",
        ("test_split_size=null", "report_to=none", "trackio_space_id=null"),
        trainer="DPO",
        rows=lambda: doubled()[: COUNT + COUNT // 3],
        options={"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        command="dpo",
    ),
    Case("trl/dpo_zephyr_qlora.yaml", ("torch_dtype=float32", "max_prompt_length=null"), trainer="DPO", command="dpo"),
    Case("trl/dpo_smollm3.yaml", trainer="DPO", rows=doubled, options={"loss_type": "apo_zero"}, command="dpo"),
    Case("trl/sft_cli.yaml", trainer="SFT", rows=reviews, command="sft", slow=False),
    Case("trl/sft_capybara.yaml", trainer="SFT", rows=chats, command="sft"),
    Case(
        "trl/cpo.yaml",
        trainer="CPO",
        options={"loss_type": "simpo", "beta": 0.1, "cpo_alpha": 0.5, "simpo_gamma": 0.5},
        command="cpo",
    ),
    Case("trl/kto.yaml", trainer="KTO", rows=labelled, options={"undesirable_weight": 1.33}, command="kto"),
    Case("trl/reward.yaml", command="reward"),
    Case(
        "trl/orpo_capybara.yaml",
        ("max_prompt_length=null",),
        trainer="ORPO",
        options={"beta": 0.05},
        command="orpo",
    ),
    Case(
        "trl/grpo_demo.yaml",
        ("num_generations=4", "max_completion_length=8", "per_device_train_batch_size=16"),
        command="grpo",
    ),
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data sets by their hub names."""
    folder = tmp_path_factory.mktemp("hub")
    write_hub(folder)
    return folder


@pytest.fixture(autouse=True)
def workplace(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder is the hub, without an earlier run."""
    monkeypatch.chdir(hub)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(hub / "cache"))
    shutil.rmtree(hub / "out", ignore_errors=True)


def overrides(case: Case) -> list[str]:
    """What is set beside what the file says."""
    values = yaml.safe_load((FILES / case.file).read_text(encoding="utf-8"))
    found = [f"{name}={value}" for name, value in PLAIN.items() if values.get(name)]
    found += ["adapter=lora"] if values.get("adapter") == "qlora" else []
    for name in ("optimizer", "optim"):
        if any(part in str(values.get(name)) for part in ("8bit", "4bit", "paged")):
            found.append(f"{name}=adamw_torch")
    return [*SHORT[case.tool], *found, "max_steps=2", "logging_steps=1", *case.more]


def first_of_trl(case: Case, found: Conversion) -> dict[str, float]:
    """What TRL logs of the first step: its trainer on its own columns, with the tokenizer that the run has saved."""
    named = {"ORPO": trl_experimental("orpo"), "CPO": trl_experimental("cpo")}.get(case.trainer, trl)
    reward = case.trainer == "Reward"
    dtype = found.run.model.dtype
    kind: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    more = {"num_labels": 1} if reward else {}
    model = kind.from_pretrained(
        found.run.model.name, dtype=torch.float32 if dtype == "auto" else getattr(torch, dtype), **more
    )
    tokenizer = AutoTokenizer.from_pretrained("out")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    end_with_the_turn(tokenizer)
    rows = case.rows()
    config = getattr(named, f"{case.trainer}Config")
    options = {"max_length": found.run.train.max_length, "bf16": False, **case.options}
    if case.trainer in ("DPO", "CPO", "ORPO", "KTO") and "beta" not in options:
        options["beta"] = found.run.objective.further.get("beta", 0.1)
    others = {"ref_model": kind.from_pretrained(found.run.model.name, dtype=model.dtype)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = getattr(named, f"{case.trainer}Trainer")(
            model=model,
            args=config(
                output_dir="trl",
                per_device_train_batch_size=len(rows),
                max_steps=1,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
                gradient_checkpointing=False,
                **options,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            **(others if case.trainer in ("DPO", "KTO") else {}),
        )
        trainer.train()
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


def end_with_the_turn(tokenizer: Any) -> None:
    """Have conversations end with their last turn, as here and in Axolotl; TRL keeps a line feed after it."""
    plain, feed = tokenizer.apply_chat_template, tokenizer("\n", add_special_tokens=False)["input_ids"]

    def apply(messages: Any, **options: Any) -> Any:
        found = plain(messages, **options)
        if isinstance(found, str) and not options.get("add_generation_prompt"):
            return found.removesuffix("\n")
        if options.get("add_generation_prompt") or not isinstance(found, Mapping):
            return found
        if found["input_ids"][-len(feed) :] != feed:
            return found
        return {name: values[: -len(feed)] for name, values in found.items()}

    tokenizer.apply_chat_template = apply


def trl_experimental(name: str) -> Any:
    """A module of TRL that warns that it may change."""
    import importlib

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"trl.experimental.{name}")


MARKED = [pytest.param(case, id=case.file, marks=[pytest.mark.slow] if case.slow else []) for case in CASES]


@pytest.mark.parametrize("case", MARKED)
def test_a_file_trains_with_the_first_loss_of_trl(case: Case) -> None:
    found = convert_file(FILES / case.file, overrides(case), case.command)
    Path("run.yaml").write_text(run_file_text(found), encoding="utf-8")
    assert load_run_file("run.yaml").to_dict() == found.run.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(found.run)
        train_and_evaluate(trainer, found.run)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    assert Path("out/report.html").is_file()
    if not case.trainer:
        return
    theirs = first_of_trl(case, found)
    tolerance = 1e-4 if found.run.model.dtype in ("auto", "float32") and not trainer.args.bf16 else 2e-2
    for name in ("loss", "logps/chosen", "logps/rejected"):
        if name in theirs:
            assert logged[0][name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), name


def test_every_file_has_a_case() -> None:
    there = {f"{path.parent.name}/{path.name}" for path in FILES.glob("*/*.y*ml")}
    assert there == {case.file for case in CASES}
    counts = {tool: sum(case.tool == tool for case in CASES) for tool in SHORT}
    assert all(
        counts[tool] >= least
        for tool, least in {"axolotl": 15, "trl": 8, "llamafactory": 7, "llamafactory_v1": 2}.items()
    )


def test_a_file_that_stops_says_what_to_type() -> None:
    with pytest.raises(ConfigError, match=r"`max_prompt_length` is 1792 .*; there is no such option any more"):
        convert_file(FILES / "trl/orpo_capybara.yaml", command="orpo")
