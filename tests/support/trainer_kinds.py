"""Every kind of trainer on tiny rows: its settings, how one is made, and how two runs are compared."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification

import tether
from tiny import CONFIGS, QUIET, pair_rows, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PAIRS = pair_rows(12)
LABELLED = [
    {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
    for i, row in enumerate(PAIRS)
]
TEXTS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
MARGINS = [{**row, "margin": 0.2 * (i % 3), "weight": 1.0 + i % 2} for i, row in enumerate(PAIRS)]
# Name to trainer, rows and settings; each is trained in the same ways below.
KINDS = {
    "kto": ("KTO", LABELLED, {"loss_type": "kto", "desirable_weight": 0.5}),
    "kto on pairs": ("KTO", PAIRS[:6], {"loss_type": "kto"}),
    "bco": ("KTO", LABELLED, {"loss_type": "bco"}),
    "apo_zero_unpaired": ("KTO", LABELLED, {"loss_type": "apo_zero_unpaired"}),
    "orpo": ("ORPO", PAIRS, {"beta": 0.5}),
    "cpo": ("CPO", PAIRS, {}),
    "simpo": ("CPO", PAIRS, {"loss_type": "simpo", "beta": 2.0}),
    "sft": ("SFT", TEXTS, {}),
    "sft with prompts": ("SFT", TEXTS, {"completion_only_loss": False}),
    "reward": ("Reward", MARGINS, {"center_rewards_coefficient": 0.05}),
}
WITH_REFERENCE = [name for name, (trainer, _, _) in KINDS.items() if trainer == "KTO"]


def model_for(trainer, seed=0):
    sizes = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if trainer != "Reward":
        return tiny_model(seed=seed, **sizes)
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(LlamaConfig(**{**CONFIGS["llama"][1], **sizes}, num_labels=1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


def build(folder, kind, *, rows=None, **arguments):
    """A trainer of a kind; settings are told from the constructor's arguments by their names."""
    trainer, own_rows, own_settings = KINDS[kind]
    config = getattr(tether, f"{trainer}Config")
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        **QUIET,
        "gradient_checkpointing": False,
        **own_settings,
        **{name: arguments.pop(name) for name in list(arguments) if name in config.__dataclass_fields__},
    }
    return getattr(tether, f"{trainer}Trainer")(
        model=arguments.pop("model", None) or model_for(trainer),
        args=config(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(own_rows if rows is None else rows),
        processing_class=TOKENIZER,
        **arguments,
    )


def weights(run):
    return {name: tensor.detach().clone() for name, tensor in run.policy.named_parameters() if tensor.requires_grad}


def logged(run, name="loss"):
    return [log[name] for log in run.state.log_history if "loss" in log]


def assert_alike(run, expected, *, tolerance=1e-5):
    assert logged(run) == pytest.approx(logged(expected), abs=tolerance)
    found = weights(run)
    for name, value in weights(expected).items():
        torch.testing.assert_close(found[name], value, atol=tolerance, rtol=1e-4)


def other(kind, seed=5):
    """Another model as the reference, where there is one; with this one the KL estimate is above 0 from the start."""
    return {"ref_model": model_for("KTO", seed)} if kind in WITH_REFERENCE else {}
