"""The golden cases: what is trained, in which way, and what is recorded; only names that a user of tether has."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

import tether
from completions_server import serving
from tiny import CONFIGS, QUIET, pair_rows, tiny_model, tiny_tokenizer

# The option that forces how the reference is computed: written here only, so that it can be renamed.
METHOD = "reference_method"

TOKENIZER = tiny_tokenizer()
SIZES = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# 11 rows in steps of 2 x 2: three steps, the last with a micro-batch of one row.
PAIRS = pair_rows(11)
LABELLED = [
    {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
    for i, row in enumerate(PAIRS)
]
TEXTS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
MARGINS = [{**row, "margin": 0.1 + 0.2 * (i % 3), "weight": 1.0 + i % 2} for i, row in enumerate(PAIRS)]
RANKED = [
    {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"], f" {i} times"]}
    for i, row in enumerate(PAIRS)
]

# Nothing that is timed or measured may decide on the arithmetic: precision, product library, tokens per forward.
SETTINGS: dict[str, Any] = {
    **QUIET,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 2,
    "max_steps": 3,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "bf16": False,
    "cpu_matmul": "default",
    "max_tokens_per_forward": None,
    "dataset_cache": None,
    "seed": 3,
}
# Not numbers of the training: they differ from run to run.
_MEASURED = ("runtime", "per_second", "memory", "flos", "seconds", "time")


# -- models ------------------------------------------------------------------------------------------------------------


def plain(seed: int = 0) -> PreTrainedModel:
    """A language model that trains whole."""
    return tiny_model(seed=seed, **SIZES)


def rewarding() -> PreTrainedModel:
    """A model with a head for one reward."""
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**{**CONFIGS["llama"][1], **SIZES}, num_labels=1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


def lora(**changes: Any) -> LoraConfig:
    """An adapter on two projections."""
    targets = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**{"r": 4, "lora_alpha": 8, **targets, **changes})


def adapted(family: str = "llama", **changes: Any) -> PeftModel:
    """A language model with an adapter that was put on by the caller."""
    with warnings.catch_warnings():
        # PEFT warns that a model with trained biases is not itself with its adapter off: that is what is recorded here.
        warnings.simplefilter("ignore")
        return get_peft_model(tiny_model(family, **SIZES), lora(**changes))


def continued() -> PeftModel:
    """An adapter that has learnt something before."""
    model = adapted()
    _learnt(model, "lora_B")
    return model


def biased() -> PeftModel:
    """An adapter with trained biases that are not 0."""
    model = adapted("qwen2", bias="all")
    _learnt(model, "bias")
    return model


def beside_another() -> PeftModel:
    """A policy that trains one adapter beside a learnt one called `other`."""
    model = adapted()
    model.add_adapter("other", lora(r=2))
    _learnt(model, "lora_B.other")
    model.set_adapter("default")
    return model


def _learnt(model: PeftModel, part: str) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


# -- cases -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One run: a trainer, its rows and settings; models are built anew for each run.

    Args:
        trainer: the public trainer's name without `Trainer`.
        settings: on top of `SETTINGS`, for the configuration.
        model: builds the policy.
        peft_config: an adapter that the trainer puts on.
        ref_model: builds a second model, the reference.
        served: builds a model that a completions server on this machine serves as the reference.
        stored: two runs with one store: the first fills it, the second reads it.
        resumed: the recorded run goes on from the second step's checkpoint of a run before it.
    """

    trainer: str
    rows: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], Any] = plain
    peft_config: LoraConfig | None = None
    ref_model: Callable[[], Any] | None = None
    served: Callable[[], PreTrainedModel] | None = None
    stored: bool = False
    resumed: bool = False

    def but(self, **changes: Any) -> Case:
        """The case with other settings."""
        return Case(**{**self.__dict__, "settings": {**self.settings, **changes}})

    def also(self, **fields: Any) -> Case:
        """The case with other fields."""
        return Case(**{**self.__dict__, **fields})


def other() -> PreTrainedModel:
    """A second model that is not the policy's start."""
    return plain(seed=5)


def _dpo(**settings: Any) -> Case:
    return Case("DPO", PAIRS, settings)


_KTO = Case("KTO", LABELLED, {"loss_type": "kto", "desirable_weight": 0.5}, ref_model=other)
_BCO = Case("KTO", LABELLED, {"loss_type": "bco"}, ref_model=other)
_ORPO = Case("ORPO", PAIRS, {"beta": 0.5})
_SFT = Case("SFT", TEXTS)
_REWARD = Case("Reward", MARGINS, {"center_rewards_coefficient": 0.05}, model=rewarding)
_LORA = _dpo().also(peft_config=lora())

# Losses that only need their name.
_PLAIN_LOSSES = ("ipo", "apo_zero", "aot", "simpo")
TRAINERS: dict[str, Case] = {
    "dpo sigmoid": _dpo(),
    **{f"dpo {name}": _dpo(loss_type=name) for name in _PLAIN_LOSSES},
    "dpo label smoothing, js divergence": _dpo(label_smoothing=0.1, f_divergence_type="js_divergence"),
    "dpo of uneven lengths, weighting": _dpo(ld_alpha=0.5, use_weighting=True),
    "dpo combination": _dpo(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    "dpo tdpo2": _dpo(loss_type="tdpo2").also(peft_config=lora()),
    "dpo rpo with margins": Case("DPO", MARGINS, {"loss_type": "rpo"}),
    "dpo plackett_luce": Case("DPO", RANKED, {"loss_type": "plackett_luce"}),
    "kto": _KTO,
    "kto on pairs": Case("KTO", PAIRS[:6], {"loss_type": "kto"}, ref_model=other),
    "kto lora": _KTO.also(peft_config=lora(), ref_model=None),
    "bco": _BCO,
    "apo_zero_unpaired": Case("KTO", LABELLED, {"loss_type": "apo_zero_unpaired"}),
    "orpo": _ORPO,
    "cpo": Case("CPO", PAIRS),
    "simpo": Case("CPO", PAIRS, {"loss_type": "simpo", "beta": 2.0}),
    "sft": _SFT,
    "sft with prompts": _SFT.but(completion_only_loss=False),
    "sft lora with dropout": _SFT.also(peft_config=lora(lora_dropout=0.2)),
    "reward": _REWARD,
    "reward lora": _REWARD.also(peft_config=lora(task_type="SEQ_CLS")),
    "dpo padded": _dpo(scoring_layout="padded"),
    "dpo with gradient checkpointing": _dpo(gradient_checkpointing=True),
}
REFERENCES: dict[str, Case] = {
    "adapter_off": _LORA,
    "adapter_on": _dpo(reference_adapter="other").also(model=beside_another),
    "snapshot of a learnt adapter": _dpo().also(model=continued),
    "snapshot": _dpo(**{METHOD: "snapshot"}),
    "snapshot on the host": _dpo(reference_snapshot="host"),
    "snapshot with pissa": _dpo().also(model=lambda: adapted(init_lora_weights="pissa")),
    "snapshot with trained biases": _dpo().also(model=biased),
    "snapshot forced with an adapter": _LORA.but(**{METHOD: "snapshot"}),
    "model": _dpo().also(ref_model=other),
    "none": _dpo(reference="none"),
    "remote": _dpo().also(served=other),
    "store": _LORA.also(stored=True),
    "store of a second model, filled ahead": _KTO.but(precompute_ref_log_probs=True),
    "moving": _dpo(sync_ref_model=True, ref_model_sync_steps=1).also(ref_model=other),
    "moving beside an adapter": _LORA.but(sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.3).also(
        ref_model=other
    ),
}
_EACH = {"dpo": _LORA, "kto": _KTO, "bco": _BCO, "orpo": _ORPO, "sft": _SFT, "reward": _REWARD}
# Seven rows: the second step ends the first pass with a micro-batch of one row, the third begins the second.
STREAMED = {
    name: case.but(stream_dataset=True, dataset_buffer_size=4).also(rows=case.rows[:7]) for name, case in _EACH.items()
}
# An optimizer with a state, which resuming must bring back; its epsilon keeps it from dividing rounding by rounding.
RESUMED = {
    name: case.but(optim="adamw_torch", adam_epsilon=1e-3, learning_rate=0.01).also(resumed=True)
    for name, case in {
        **_EACH,
        "kto streamed": STREAMED["kto"],
        "moving": REFERENCES["moving"],
    }.items()
}
# A batch is four rows of about 30 to 90 tokens.
BUDGET = {
    name: case.but(per_device_train_batch_size=4, gradient_accumulation_steps=1, max_tokens_per_forward=120)
    for name, case in {**_EACH, "dpo combination": TRAINERS["dpo combination"]}.items()
}
ONE_PROCESS: dict[str, Case] = {
    **{f"trainer: {name}": case for name, case in TRAINERS.items()},
    **{f"reference: {name}": case for name, case in REFERENCES.items()},
    **{f"streamed: {name}": case for name, case in STREAMED.items()},
    **{f"resumed: {name}": case for name, case in RESUMED.items()},
    **{f"budget: {name}": case for name, case in BUDGET.items()},
}
# Two processes with micro-batches of two rows make steps of four; one process has nothing left in the last step.
TWO_PROCESSES: dict[str, Case] = {
    f"two processes: {name}": case.but(gradient_accumulation_steps=1)
    for name, case in {
        "dpo": _LORA,
        "dpo combination, streamed": TRAINERS["dpo combination"]
        .but(stream_dataset=True, dataset_buffer_size=4)
        .also(peft_config=lora(), rows=PAIRS[:7]),
        "kto": _KTO,
        "sft": _SFT,
    }.items()
}


# -- runs --------------------------------------------------------------------------------------------------------------


def build(case: Case, folder: Path, **settings: Any) -> Any:
    """The trainer of a case, which writes into a folder."""
    given = {**SETTINGS, **case.settings, **settings}
    arguments = {"peft_config": case.peft_config, "ref_model": case.ref_model and case.ref_model()}
    torch.manual_seed(0)
    return getattr(tether, f"{case.trainer}Trainer")(
        model=case.model(),
        args=getattr(tether, f"{case.trainer}Config")(output_dir=str(folder), **given),
        train_dataset=Dataset.from_list(case.rows),
        eval_dataset=Dataset.from_list(case.rows[:5]),
        processing_class=TOKENIZER,
        **{name: value for name, value in arguments.items() if value is not None},
    )


def run(case: Case, folder: Path) -> dict[str, Any]:
    """Train and evaluate a case; what is recorded of it."""
    with ExitStack() as stack:
        settings: dict[str, Any] = {}
        if case.served is not None:
            address = stack.enter_context(serving(case.served())).url
            settings["reference_remote"] = {"url": address, "concurrency": 1}
        if case.stored:
            settings["reference_store"] = str(folder / "store")
            first = _numbers(build(case, folder / "first", **settings))
            return {"filling": first, "reading": _numbers(build(case, folder / "second", **settings))}
        if case.resumed:
            build(case, folder, save_strategy="steps", save_steps=2, **settings).train()
            return _numbers(build(case, folder, **settings), resume_from_checkpoint=str(folder / "checkpoint-2"))
        return _numbers(build(case, folder, **settings))


def _numbers(trainer: Any, **resume: Any) -> dict[str, Any]:
    """Train and evaluate; the logs, and what `measured` says of each trained tensor."""
    trained = {name: tensor for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}
    start = {name: tensor.detach().clone() for name, tensor in trained.items()}
    trainer.train(**resume)
    trainer.evaluate()
    return {
        "logs": [
            {name: value for name, value in log.items() if not any(word in name for word in _MEASURED)}
            for log in trainer.state.log_history
        ],
        "weights": {
            name: measured(name, start.get(name), tensor)
            for name, tensor in trainer.model.named_parameters()
            if tensor.requires_grad
        },
    }


def measured(name: str, start: torch.Tensor | None, end: torch.Tensor) -> list[float]:
    """The norm of a tensor; and of what training added to it, sum, norm and product with numbers drawn by the name.

    The addition is far smaller than the tensor: a sum over the tensor would hide a change of it.
    """
    values = end.detach().double().flatten()
    added = values if start is None else values - start.double().flatten()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    drawn = torch.rand(values.shape, generator=generator, dtype=values.dtype)
    return [values.norm().item(), added.sum().item(), added.norm().item(), (added @ drawn).item()]


# -- comparison --------------------------------------------------------------------------------------------------------

# Another processor rounds otherwise.
RELATIVE, ABSOLUTE = 1e-5, 1e-6


def differences(found: Any, expected: Any, *, exact: bool, place: str = "") -> list[str]:
    """Where two recordings differ, each as one line; exact: to the bit."""
    if isinstance(expected, dict) and isinstance(found, dict):
        lines = [f"{place}/{name}: only in one of the two" for name in sorted(found.keys() ^ expected.keys())]
        shared = [name for name in expected if name in found]
        return lines + [
            line
            for name in shared
            for line in differences(found[name], expected[name], exact=exact, place=f"{place}/{name}")
        ]
    if isinstance(expected, list) and isinstance(found, list):
        if len(found) != len(expected):
            return [f"{place}: {len(found)} entries; expected {len(expected)}"]
        # A sum may be near 0 where its terms are not: what was added to a tensor is held to its norm.
        size = expected[2] if "/weights/" in place else 0.0
        return [
            line
            for i, (one, two) in enumerate(zip(found, expected, strict=True))
            for line in (
                _number(one, two, size, exact, f"{place}[{i}]")
                if size
                else differences(one, two, exact=exact, place=f"{place}[{i}]")
            )
        ]
    return _number(found, expected, 0.0, exact, place)


def _number(found: Any, expected: Any, size: float, exact: bool, place: str) -> list[str]:
    if found == expected or (isinstance(expected, float) and math.isnan(expected) and math.isnan(found)):
        return []
    allowed = 0.0 if exact else ABSOLUTE + RELATIVE * max(abs(expected), size)
    return [] if abs(found - expected) <= allowed else [f"{place}: {found!r}; expected {expected!r}"]
