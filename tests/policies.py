"""Policies of every kind that INV-4 lists, and what the tests of the reference do with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tether.models.structure import trainable_tensors
from tether.reference import ReferenceSpec, resolve
from tether.scoring import pack, score
from tiny import VOCABULARY, ragged_examples, tiny_model

PROBE = pack(ragged_examples())


def lora(**changes) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes}
    )


def with_lora(**changes) -> PeftModel:
    with warnings.catch_warnings():
        # PEFT warns that a model with trained biases is not itself with its adapter off: that is what is tested here.
        warnings.simplefilter("ignore")
        # One token more than the examples use.
        return get_peft_model(tiny_model(vocab_size=VOCABULARY + 1), lora(**changes))


def unfrozen_norms():
    model = with_lora()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    return model


def several_adapters():
    model = with_lora()
    model.add_adapter("second", lora(r=2))
    model.set_adapter("second")
    return model


def named_adapter():
    return get_peft_model(tiny_model(), lora(), adapter_name="preferences")


def continued_adapter(tmp=None):
    """An adapter that has learnt something before, as from supervised fine-tuning."""
    model = with_lora()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def merged():
    model = continued_adapter().merge_and_unload()
    return model.requires_grad_(True)


def edited_in_memory():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.3)
    return model


@dataclass
class Case:
    build: Callable
    method: str


def continued_tokens():
    """Token embeddings that have learnt, of tokens that no probe row contains."""
    model = with_lora(trainable_token_indices=[VOCABULARY])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.5)
    return model


def continued_embedding():
    """An adapter on the embedding that has learnt one token, which no probe row contains."""
    model = with_lora(target_modules=["q_proj", "embed_tokens"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_embedding_A" in name:
                parameter.zero_()
                parameter[:, VOCABULARY] = 1.0
            if "lora_embedding_B" in name:
                parameter.fill_(0.3)
    return model


def continued_module():
    model = with_lora(modules_to_save=["embed_tokens"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter[VOCABULARY] += 0.5
    return model


def beside_a_frozen_adapter():
    """A learnt, frozen adapter that is active beside the one in training."""
    model = continued_adapter()
    model.add_adapter("second", lora(r=2))
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".second." in name)
    return model


CASES = {
    "full": Case(tiny_model, "snapshot"),
    "full, edited in memory": Case(edited_in_memory, "snapshot"),
    "merged in memory": Case(merged, "snapshot"),
    "lora": Case(with_lora, "adapter_off"),
    "dora": Case(lambda: with_lora(use_dora=True), "adapter_off"),
    "rslora": Case(lambda: with_lora(use_rslora=True), "adapter_off"),
    "bias all": Case(lambda: biased(bias="all"), "snapshot"),
    "bias lora_only": Case(lambda: biased(bias="lora_only"), "snapshot"),
    "pissa": Case(lambda: with_lora(init_lora_weights="pissa"), "snapshot"),
    "olora": Case(lambda: with_lora(init_lora_weights="olora"), "snapshot"),
    "random init": Case(lambda: with_lora(init_lora_weights=False), "snapshot"),
    "modules_to_save": Case(lambda: with_lora(modules_to_save=["lm_head"]), "adapter_off"),
    "trainable token indices": Case(lambda: with_lora(trainable_token_indices=[5, 6, 7]), "adapter_off"),
    "unfrozen norms": Case(unfrozen_norms, "snapshot"),
    "adapter on the head": Case(lambda: with_lora(target_modules=["q_proj", "lm_head"]), "adapter_off"),
    "several adapters": Case(several_adapters, "adapter_off"),
    "adapter not called default": Case(named_adapter, "adapter_off"),
    "continued adapter": Case(continued_adapter, "snapshot"),
    "continued token indices": Case(continued_tokens, "snapshot"),
    "continued adapter on the embedding": Case(continued_embedding, "snapshot"),
    "continued modules_to_save": Case(continued_module, "snapshot"),
    "beside a frozen adapter": Case(beside_a_frozen_adapter, "snapshot"),
}


def biased(**changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny_model("qwen2"), lora(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    return model


def resolved(policy, **declared):
    return resolve(ReferenceSpec(**declared), policy, PROBE, score, lambda model: score).reference


def take_steps(policy, count=3, rate=0.1):
    """Plain gradient steps on the trainable tensors; returns how far the policy's scores moved."""
    tensors = list(trainable_tensors(policy).values())
    with torch.no_grad():
        before = score(policy, PROBE).token_logps
    for _ in range(count):
        loss = (score(policy, PROBE).logps * torch.tensor([1.0, -1.0]).repeat(4)).mean()
        for tensor, grad in zip(tensors, torch.autograd.grad(loss, tensors, allow_unused=True), strict=True):
            if grad is not None:
                with torch.no_grad():
                    tensor -= rate * grad
    with torch.no_grad():
        return (score(policy, PROBE).token_logps - before).abs().max().item()
