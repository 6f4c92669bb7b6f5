"""Kinds of adapter and of partial fine-tuning: each trains, keeps its reference, and is the same when loaded again."""

from __future__ import annotations

import math

import pytest
import torch
from peft import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    VeraConfig,
)
from transformers import AutoModelForCausalLM, MixtralConfig

from tether import DPOConfig, DPOTrainer
from tether.errors import ConfigError
from tether.models import load_policy
from tether.models.spec import ModelSpec, select_trainable
from tether.scoring import score_alone
from tiny import _SHAPE, pair_rows, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LAYERS = ["q_proj", "v_proj", "down_proj"]
# Kind to its configuration, and how the reference is computed.
KINDS = {
    "lora": (LoraConfig(r=2, target_modules=LAYERS), "adapter_off"),
    "dora": (LoraConfig(r=2, target_modules=LAYERS, use_dora=True), "adapter_off"),
    "rslora": (LoraConfig(r=2, target_modules=LAYERS, use_rslora=True), "adapter_off"),
    "pissa": (LoraConfig(r=2, target_modules=LAYERS, init_lora_weights="pissa"), "snapshot"),
    "olora": (LoraConfig(r=2, target_modules=LAYERS, init_lora_weights="olora"), "snapshot"),
    "modules_to_save": (LoraConfig(r=2, target_modules=LAYERS, modules_to_save=["lm_head"]), "adapter_off"),
    "vera": (VeraConfig(r=2, target_modules=["q_proj", "o_proj"]), "adapter_off"),
    "ia3": (IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"]), "adapter_off"),
    "loha": (LoHaConfig(r=2, target_modules=LAYERS), "adapter_off"),
    "lokr": (LoKrConfig(r=2, target_modules=LAYERS), "adapter_off"),
    "adalora": (AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=LAYERS), "adapter_off"),
    "oft": (OFTConfig(oft_block_size=4, target_modules=LAYERS), "adapter_off"),
    "hra": (HRAConfig(r=2, target_modules=LAYERS), "adapter_off"),
    "layer_norm": (LNTuningConfig(), "adapter_off"),
    "prefix": (PrefixTuningConfig(num_virtual_tokens=3), "snapshot"),
}


def policy():
    return tiny_model(vocab_size=len(TOKENIZER), pad_token_id=0, bos_token_id=1, eos_token_id=2)


def trainer(folder, model=None, *, peft_config=None, tokenizer=TOKENIZER, **changes):
    settings = {
        "max_steps": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "reference_check_steps": 1,
        **changes,
    }
    return DPOTrainer(
        model=policy() if model is None else model,
        args=DPOConfig(output_dir=str(folder), **settings),
        train_dataset=pair_rows(8),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def require_same_scores(run, again):
    """INV-38, by the model's own logits."""
    with torch.no_grad():
        torch.testing.assert_close(
            score_alone(again.eval(), run._probe), score_alone(run.policy.eval(), run._probe), atol=1e-5, rtol=0
        )


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT, of every norm that is not torch's
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_each_kind_trains_and_is_the_same_when_loaded_again(kind, tmp_path):
    """INV-1, 2, 4, 5, 38: in plain peft on the base from disk."""
    policy().save_pretrained(tmp_path / "base")
    config, means = KINDS[kind]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    run = trainer(tmp_path / "run", base, peft_config=config)
    before = {name: p.detach().clone() for name, p in run.policy.named_parameters() if p.requires_grad}
    run.train()
    run.save_model()
    losses = [log["loss"] for log in run.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[1] != losses[0]
    assert any(not torch.equal(p, before[n]) for n, p in run.policy.named_parameters() if n in before)
    assert run.resolved.reference.identity.means == means
    assert run.layout == ("padded" if kind == "prefix" else "tree")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    require_same_scores(run, PeftModel.from_pretrained(base, tmp_path / "run"))


def test_target_parameters_reach_the_experts(tmp_path):
    """An adapter on the experts' weights, which are no linear layers."""
    torch.manual_seed(0)
    fields = {**_SHAPE, "vocab_size": len(TOKENIZER), "num_local_experts": 4}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**fields))
    model.save_pretrained(tmp_path / "base")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    run = trainer(tmp_path / "run", base, peft_config=LoraConfig(r=2, target_modules=[], target_parameters=targets))
    run.train()
    run.save_model()
    assert any("experts" in n and p.requires_grad and p.abs().max() > 0 for n, p in run.policy.named_parameters())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    require_same_scores(run, PeftModel.from_pretrained(base, tmp_path / "run"))


def test_prefix_tuning_with_checkpointing_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ConfigError, match="gradient_checkpointing=False"):
        trainer(tmp_path, peft_config=PrefixTuningConfig(num_virtual_tokens=3), gradient_checkpointing=True)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_only_what_is_chosen_trains(adapter, tmp_path):
    """Partial fine-tuning: patterns choose, the reference keeps the start, the artefact loads in transformers."""
    run = trainer(
        tmp_path,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if adapter else None,
        train_parameters=[r"layers\.1\.mlp", "norm"],
        freeze_parameters=["post_attention"],
    )
    before = {name: p.detach().clone() for name, p in run.policy.named_parameters()}
    run.train()
    moved = {name for name, p in run.policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("layers.1.mlp" in name or "norm" in name or "lora" in name for name in moved)
    assert any("lora" in name for name in moved) == adapter
    assert any("layers.1.mlp" in name for name in moved)
    assert not any("post_attention" in name for name in moved)
    assert run.resolved.reference.identity.means == "snapshot"
    if not adapter:
        run.save_model()
        require_same_scores(run, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_patterns_that_choose_nothing_are_refused():
    with pytest.raises(ConfigError, match="No parameter has 'no_such_layer'"):
        select_trainable(policy(), ["no_such_layer"], [])
    with pytest.raises(ConfigError, match="no regular expression"):
        select_trainable(policy(), [], ["("])


def test_a_tied_head_is_found_by_either_name():
    model = tiny_model(tie_word_embeddings=True)
    select_trainable(model, [], ["lm_head"])
    assert not model.get_input_embeddings().weight.requires_grad


def test_new_tokens_begin_as_the_mean_and_are_trained(tmp_path):
    """The tokenizer, both embeddings and the artefact agree; a token that exists is refused."""
    tokenizer, model = tiny_tokenizer(), policy()
    old = len(tokenizer)
    means = [m.weight.detach().mean(0).clone() for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    run = trainer(tmp_path, model, tokenizer=tokenizer, add_tokens=["<think>", "</think>"], max_steps=1)
    assert len(tokenizer) == old + 2
    assert tokenizer.encode("<think>", add_special_tokens=False) == [old]
    for module, mean in zip((model.get_input_embeddings(), model.get_output_embeddings()), means, strict=True):
        assert module.weight.shape[0] == old + 2
        torch.testing.assert_close(module.weight[old:], mean.expand(2, -1), atol=1e-6, rtol=0)
    run.train()
    run.save_model()
    require_same_scores(run, load_policy(tmp_path, dtype="float32"))
    with pytest.raises(ConfigError, match="has '<think>' already"):
        trainer(tmp_path, tokenizer=tokenizer, add_tokens=["<think>"])


def test_a_spec_loads_what_it_says_and_refuses_what_it_cannot(tmp_path):
    policy().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    spec = ModelSpec.of(tmp_path, {"dtype": "bfloat16", "attn_implementation": "eager"})
    model = spec.load()
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert spec.load_config().vocab_size == len(TOKENIZER)
    assert len(spec.load_processing()) == len(TOKENIZER)
    with pytest.raises(ConfigError, match="quantization is '2bit'"):
        ModelSpec(tmp_path, quantization="2bit")
    with pytest.raises(ConfigError, match="came together"):
        ModelSpec.of(tmp_path, {"quantization": "4bit", "quantization_config": object()})
