"""Kinds of adapter and of partial fine-tuning: each trains, keeps its reference, and is the same when loaded again."""

from __future__ import annotations

import json
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
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig

from tether import DPOConfig, DPOTrainer
from tether.errors import ConfigError, ScoringError
from tether.models import load_policy
from tether.models.adapters import refuse_unfit_virtual_tokens
from tether.models.spec import ModelSpec, select_trainable
from tether.models.structure import adapters_off
from tether.reference.methods.none import NoReference
from tether.reference.record import write_record
from tether.scoring import pack, score, score_alone
from tiny import _SHAPE, QUIET, pair_rows, ragged_examples, tiny_model, tiny_tokenizer
from tiny_seq2seq import tiny_seq2seq

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
    "prompt": (PromptTuningConfig(num_virtual_tokens=3), "snapshot"),
}


def policy():
    return tiny_model(vocab_size=len(TOKENIZER), pad_token_id=0, bos_token_id=1, eos_token_id=2)


def trainer(folder, model=None, *, peft_config=None, tokenizer=TOKENIZER, rows=None, **changes):
    settings = {
        "max_steps": 2,
        "learning_rate": 0.01,
        **QUIET,
        "gradient_checkpointing": False,
        "reference_check_steps": 1,
        **changes,
    }
    return DPOTrainer(
        model=policy() if model is None else model,
        args=DPOConfig(output_dir=str(folder), **settings),
        train_dataset=rows or pair_rows(8),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def require_same_scores(run, again):
    """INV-38, by the model's own logits."""
    with torch.no_grad():
        torch.testing.assert_close(
            score_alone(again.eval(), run.run.probe), score_alone(run.policy.eval(), run.run.probe), atol=1e-5, rtol=0
        )


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT, of every norm that is not torch's
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sweep(1)
def test_an_adapter_of_each_kind_trains_and_is_the_same_when_loaded_again(kind, tmp_path):
    """INV-1, 2, 4, 5, 38: in plain peft on the base from disk."""
    policy().save_pretrained(tmp_path / "base")
    config, method = KINDS[kind]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    run = trainer(tmp_path / "run", base, peft_config=config, save_strategy="steps", save_steps=1)
    before = {name: p.detach().clone() for name, p in run.policy.named_parameters() if p.requires_grad}
    run.train()
    run.save_model()
    losses = [log["loss"] for log in run.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[1] != losses[0]
    assert any(not torch.equal(p, before[n]) for n, p in run.policy.named_parameters() if n in before)
    assert run.run.reference.identity.method == method
    assert run.run.layout == ("padded" if kind in ("prefix", "prompt") else "tree")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    require_same_scores(run, PeftModel.from_pretrained(base, tmp_path / "run"))
    # INV-7: one step, a checkpoint and another.
    again = trainer(tmp_path / "run", AutoModelForCausalLM.from_pretrained(tmp_path / "base"), peft_config=config)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    require_same_scores(run, again.policy)


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_resume_and_are_continued(kind, tmp_path):
    """INV-4, 7: 4 steps are 2, a checkpoint and 2 more; and a saved one is another run's start."""
    policy().save_pretrained(tmp_path / "base")
    config, _ = KINDS[kind]

    def run(folder, model=None, **changes):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base") if model is None else model
        return trainer(tmp_path / folder, model, learning_rate=0.1, lr_scheduler_type="constant", **changes)

    whole = run("whole", peft_config=config, max_steps=4)
    whole.train()
    run("half", peft_config=config, max_steps=2, save_strategy="steps", save_steps=2).train()
    again = run("half", peft_config=config, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    require_same_scores(whole, again.policy)

    whole.save_model()
    further = run("further", load_policy(tmp_path / "whole", dtype="float32"), reference="start")
    require_same_scores(whole, further.policy)
    assert further.run.reference.identity.method == "snapshot"
    further.train()
    losses = [log["loss"] for log in further.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[1] != losses[0]


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_prompt_tuning_is_scored_where_its_tokens_have_moved_the_row():
    """INV-16: padded rows are the rows alone; a score that forgets the virtual tokens is another one."""
    model = get_peft_model(policy(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    batch = pack(ragged_examples())
    with torch.no_grad():
        alone, padded = score_alone(model, batch), score(model, batch, layout="padded").token_logps
        torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)
        with adapters_off(model):
            without = score(model, batch, layout="padded").token_logps
        torch.testing.assert_close(without, score_alone(model.get_base_model(), batch), atol=1e-5, rtol=0)
    assert (without - alone).abs().max() > 1e-3
    with pytest.raises(ScoringError, match="a packed row has no place"):
        score(model, batch)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8), "could not be resumed"),
        (PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True), "prefix_projection"),
    ],
    ids=["p_tuning", "projection"],
)
def test_virtual_tokens_that_a_checkpoint_cannot_hold_are_refused(config, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        trainer(tmp_path, peft_config=config)


def test_virtual_tokens_before_an_encoder_are_refused():
    with pytest.raises(ConfigError, match="encodes each prompt once"):
        refuse_unfit_virtual_tokens(PromptTuningConfig(num_virtual_tokens=3), tiny_seq2seq("t5_tied").config)


def saved_adapter(folder, **changes):
    """A base in `base` and, in `sft`, an adapter on it that has learnt something."""
    policy().save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    first = get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": LAYERS, "task_type": "CAUSAL_LM", **changes}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    first.save_pretrained(folder / "sft")
    return first.eval()


def stacked(folder, name, peft_config, **changes):
    """A run with a new adapter over the one in `sft`."""
    options = {"adapter": str(folder / "sft"), "dtype": "float32"}
    return trainer(
        folder / name,
        str(folder / "base"),
        peft_config=peft_config,
        model_init_kwargs=options,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        **changes,
    )


@pytest.mark.parametrize("kind", ["lora", "dora", "modules_to_save"])
@pytest.mark.sweep(1)
def test_a_new_adapter_over_a_frozen_one(kind, tmp_path):
    """INV-1, 4, 5, 7, 38: the start is base and first adapter; only the second trains; what is saved is both."""
    first, config = saved_adapter(tmp_path), KINDS[kind][0]
    whole = stacked(tmp_path, "whole", config, max_steps=4)
    torch.testing.assert_close(
        whole.run.reference.score(whole.run.probe).token_logps, score_alone(first, whole.run.probe), atol=1e-5, rtol=0
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert (score_alone(first, whole.run.probe) - score_alone(plain, whole.run.probe)).abs().max() > 1e-2
    before = {name: p.detach().clone() for name, p in whole.policy.named_parameters()}
    whole.train()
    moved = {name for name, p in whole.policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(".default." in name for name in moved)
    losses = [log["loss"] for log in whole.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    whole.save_model()
    require_same_scores(whole, load_policy(tmp_path / "whole", dtype="float32"))

    stacked(tmp_path, "half", config, max_steps=2, save_strategy="steps", save_steps=2).train()
    again = stacked(tmp_path, "half", config, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert again.policy.active_adapters == ["default", "frozen"]
    require_same_scores(whole, again.policy)


def test_what_a_stack_saves_loads_in_plain_peft_and_carries_another(tmp_path):
    """INV-38, as docs/models.md says it; and a third adapter over the two."""
    saved_adapter(tmp_path)
    run = stacked(tmp_path, "run", KINDS["lora"][0])
    run.train()
    run.save_model()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "run")
    model.load_adapter(tmp_path / "run" / "frozen", "frozen")
    with torch.no_grad():
        first_alone = (score_alone(model.eval(), run.run.probe) - score_alone(run.policy, run.run.probe)).abs().max()
    assert first_alone > 1e-3, "without the one beneath it is another model"
    model.base_model.set_adapter(["default", "frozen"])
    require_same_scores(run, model)

    (tmp_path / "sft").rename(tmp_path / "elsewhere")
    (tmp_path / "run").rename(tmp_path / "sft")
    third = stacked(tmp_path, "third", KINDS["lora"][0], reference="start")
    assert third.policy.active_adapters == ["default", "frozen", "frozen_2"]
    torch.testing.assert_close(
        third.run.reference.score(third.run.probe).token_logps,
        score_alone(run.policy, third.run.probe),
        atol=1e-5,
        rtol=0,
    )
    (tmp_path / "sft" / "frozen" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="trained over another one, 'frozen', which is not there"):
        load_policy(tmp_path / "sft", dtype="float32")


def test_an_adapter_by_its_folder_is_continued(tmp_path):
    """Without a new one it trains on, and the start is the adapter as it was."""
    first = saved_adapter(tmp_path)
    run = stacked(tmp_path, "run", None)
    assert run.policy.active_adapters == ["default"]
    torch.testing.assert_close(
        run.run.reference.score(run.run.probe).token_logps, score_alone(first, run.run.probe), atol=1e-5, rtol=0
    )
    run.train()
    assert any("lora_B" in name and p.requires_grad for name, p in run.policy.named_parameters())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (VeraConfig(r=2, target_modules=["q_proj"]), "only adapters of one kind"),
        (PromptTuningConfig(num_virtual_tokens=3), "only adapters of one kind"),
        (KINDS["pissa"][0], "writing into the base weights"),
    ],
    ids=["vera", "prompt", "pissa"],
)
def test_adapters_that_do_not_stack_are_refused(config, words, tmp_path):
    saved_adapter(tmp_path)
    with pytest.raises(ConfigError, match=words):
        stacked(tmp_path, "run", config)


def test_an_adapter_that_cannot_be_used_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    saved_adapter(tmp_path)
    monkeypatch.setattr("tether.models.spec.load_policy", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match="not a folder with adapter_config"):
        ModelSpec(tmp_path / "base", adapter=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="names another"):
        ModelSpec(tmp_path / "sft", adapter=tmp_path / "sft")
    with pytest.raises(ConfigError, match="allowed are auto, balanced"):
        ModelSpec(tmp_path / "base", device_map="cudda")
    write_record(tmp_path / "sft", NoReference(), "reference: none", None)
    with pytest.raises(ConfigError, match="was trained by Tether against"):
        stacked(tmp_path, "run", KINDS["lora"][0])


def test_a_quantisation_beside_the_arguments_is_loaded_with(tmp_path, monkeypatch):
    """TRL's argument; the caller's configuration stays as it was, and can be written as JSON with it."""
    policy().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    seen = []
    original = ModelSpec.options

    def unquantised(self):
        seen.append(original(self).pop("quantization_config"))
        return {name: value for name, value in original(self).items() if name != "quantization_config"}

    monkeypatch.setattr(ModelSpec, "options", unquantised)
    args = DPOConfig(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True)
    keywords = {"args": args, "train_dataset": pair_rows(8), "peft_config": KINDS["lora"][0]}
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    run = DPOTrainer(model=str(tmp_path / "base"), quantization_config=quantization, **keywords)
    assert seen[0]["load_in_4bit"] is True
    assert seen[0]["bnb_4bit_quant_type"] == "nf4"
    json.loads(run.args.to_json_string())
    assert args.model_init_kwargs is None
    with pytest.raises(ConfigError, match="was given with models in memory"):
        DPOTrainer(model=policy(), quantization_config=quantization, processing_class=TOKENIZER, **keywords)
    args.model_init_kwargs = {"quantization": "4bit"}
    with pytest.raises(ConfigError, match="Leave one out"):
        DPOTrainer(model=str(tmp_path / "base"), quantization_config=quantization, **keywords)


def test_an_adapter_of_another_shape_is_refused(tmp_path):
    saved_adapter(tmp_path)
    tiny_model(vocab_size=len(TOKENIZER), hidden_size=64).save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="does not fit LlamaForCausalLM"):
        stacked(tmp_path, "run", KINDS["lora"][0])


def test_prefix_tuning_with_checkpointing_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ConfigError, match="gradient_checkpointing=False"):
        trainer(tmp_path, peft_config=PrefixTuningConfig(num_virtual_tokens=3), gradient_checkpointing=True)


@pytest.mark.sweep(1)
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
    assert run.run.reference.identity.method == "snapshot"
    if not adapter:
        run.save_model()
        require_same_scores(run, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_patterns_that_choose_nothing_are_refused():
    with pytest.raises(ConfigError, match="No parameter has 'no_such_layer'"):
        select_trainable(policy(), ["no_such_layer"], [])
    with pytest.raises(ConfigError, match="not a regular expression"):
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


@pytest.mark.sweep(1)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_new_tokens_are_learnt_beside_an_adapter(tied, tmp_path):
    """Their rows move and no others do; the adapter's folder loads on the base that lacks them (INV-38)."""
    sizes = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tiny_model(tie_word_embeddings=tied, **sizes).save_pretrained(tmp_path / "base")
    tokenizer, base = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rows = [{**row, "prompt": row["prompt"] + "<think>"} for row in pair_rows(8)]
    run = trainer(
        tmp_path / "run",
        base,
        tokenizer=tokenizer,
        add_tokens=["<think>"],
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        rows=rows,
    )
    new = len(tokenizer) - 1
    before = run.policy(torch.tensor([[5, new]])).logits.detach()
    embeddings = [m for m in run.policy.modules() if hasattr(m, "trainable_tokens_delta")]
    start = [m.trainable_tokens_delta["default"].detach().clone() for m in embeddings]
    run.train()
    run.save_model()
    assert any(not torch.equal(m.trainable_tokens_delta["default"], d) for m, d in zip(embeddings, start, strict=True))
    assert not torch.equal(run.policy(torch.tensor([[5, new]])).logits, before)
    require_same_scores(run, load_policy(tmp_path / "run", dtype="float32"))
    with pytest.raises(ConfigError, match="nothing would train the new tokens"):
        trainer(tmp_path, tokenizer=tiny_tokenizer(), add_tokens=["<a>"], peft_config=KINDS["vera"][0])
    options = {"adapter": str(tmp_path / "run"), "dtype": "float32"}
    with pytest.raises(ConfigError, match="adapter that is continued, in which nothing would train"):
        trainer(
            tmp_path,
            str(tmp_path / "base"),
            model_init_kwargs=options,
            add_tokens=["<a>"],
            tokenizer=tiny_tokenizer(),
            reference="start",
        )


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
    with pytest.raises(ConfigError, match="were given together"):
        ModelSpec.of(tmp_path, {"quantization": "4bit", "quantization_config": object()})
