"""What is known before weights are read is said then; experts are measured; noise is a sequence's own."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, Llama4TextConfig, TrainerCallback

import tether.models.spec as specs
from tether import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from tether.errors import ConfigError, DataError
from tether.models.before.limits import Limits, rotary_limit
from tether.training.noise import sequence_noise
from tether.training.saving.preflight import check_before_loading
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SIZES = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LONG = [{"prompt": "the film was good " * 12, "chosen": " good", "rejected": " bad"}]


def trainer(
    folder,
    model,
    *,
    kind=DPOTrainer,
    config=DPOConfig,
    rows=None,
    evaluation=None,
    callbacks=None,
    reference_model=None,
    **changes,
):
    settings = {"max_steps": 1, **QUIET, "gradient_checkpointing": False, "dataset_cache": None, **changes}
    return kind(
        model=model if isinstance(model, torch.nn.Module) else str(model),
        args=config(output_dir=str(folder), **settings),
        train_dataset=rows or pair_rows(8),
        eval_dataset=evaluation,
        processing_class=TOKENIZER,
        callbacks=callbacks,
        **({} if reference_model is None else {"ref_model": reference_model}),
    )


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Saves a tiny model and sees to it that nothing of it is read again."""
    monkeypatch.setattr(specs, "load_policy", lambda *_, **__: pytest.fail("weights were loaded"))

    def save(family="gpt2", **changes):
        tiny_model(family, **{**SIZES, **changes}).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.mark.parametrize("where", ["train", "evaluation", "stream"])
def test_a_table_of_positions_is_a_limit_of_all_rows(where, saved, tmp_path):
    """GPT-2 reads past its table with an index error in the middle of a run, or not at all on a GPU."""
    folder = saved("gpt2", n_positions=30)
    rows = [*pair_rows(8), *LONG]
    sets = {"evaluation": {"evaluation": LONG}, "train": {"rows": rows}}.get(where, {"rows": rows})
    streamed = {"stream_dataset": True} if where == "stream" else {}
    with pytest.raises(DataError, match=r"GPT2 has a table of 30 positions. Set max_length to 30 or less"):
        trainer(tmp_path / "run", folder, max_length=None, **sets, **streamed)


def test_ids_that_a_model_lacks_are_known_before_it_is_loaded(saved, tmp_path):
    with pytest.raises(DataError, match=r"the rows have the token id \d+, and Llama has 50 embeddings"):
        trainer(tmp_path / "run", saved("llama", vocab_size=50))


def test_a_prompt_with_the_completion_of_another_row_is_a_row_too(saved, tmp_path):
    """KTO's estimate of the KL divergence puts them together; neither row alone is too long."""
    long, short = "the film was good " * 5, "the film "
    rows = [
        {"prompt": long, "completion": " good", "label": True},
        {"prompt": short, "completion": " " + long.strip(), "label": False},
    ]
    folder = saved("gpt2", n_positions=30)
    with pytest.raises(DataError, match=r"the longest sequence has 4\d tokens, and GPT2 has a table of 30 positions"):
        trainer(tmp_path / "run", folder, kind=KTOTrainer, config=KTOConfig, rows=rows * 2)
    with pytest.raises(pytest.fail.Exception, match="weights were loaded"):
        trainer(tmp_path / "run", folder, kind=KTOTrainer, config=KTOConfig, rows=rows * 2, max_length=30)


def test_another_model_that_is_the_reference_has_limits_of_its_own(saved, tmp_path):
    policy = saved("gpt2", n_positions=128)
    tiny_model("gpt2", **SIZES, n_positions=8).save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match=r"for the reference model, .* GPT2 has a table of 8 positions"):
        trainer(tmp_path / "run", policy, reference_model=str(tmp_path / "other"))
    with pytest.raises(DataError, match=r"for the reference model, .* and Llama has 20 embeddings"):
        trainer(tmp_path / "run", policy, reference_model=tiny_model("llama", **{**SIZES, "vocab_size": 20}))


def test_virtual_tokens_of_an_adapter_that_is_continued_take_places(saved, tmp_path):
    model = tiny_model("gpt2", **SIZES, n_positions=30)
    saved("gpt2", n_positions=30)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=25)
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(DataError, match="tokens and 25 virtual ones before them, and GPT2 has a table of 30 positions"):
        trainer(tmp_path / "run", tmp_path / "adapter", reference="start")


def test_a_rotary_embedding_by_length_is_a_limit_wherever_it_is_said():
    """For all layers, or for each type of layer."""
    config = tiny_model("llama").config
    assert rotary_limit(config) is None
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert rotary_limit(config) == (256, "dynamic")
    inside = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    config.rope_parameters = {"full_attention": inside, "sliding_attention": {"rope_type": "default"}}
    assert rotary_limit(config) == (64, "longrope")
    said = Limits(config, None, None, virtual=4).problem(61, 5)
    assert "61 tokens and 4 virtual ones before them" in said
    assert "Set max_length to 60 or less" in said
    assert Limits(config, None, None).problem(64, 5) == ""


def test_experts_without_a_balancing_loss_train_and_an_explicit_weight_is_refused(tmp_path, caplog):
    """Report: huggingface/trl#7248. transformers computes no such loss for Llama 4."""
    changes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 16}
    config = transformers_llama4(**changes)
    model = AutoModelForCausalLM.from_config(config)
    with caplog.at_level("INFO", logger="tether"):
        trainer(tmp_path / "run", model).train()
    assert "experts: no load-balancing loss, although the configuration weighs one by 0.001" in caplog.text
    model.save_pretrained(tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specs, "load_policy", lambda *_, **__: pytest.fail("weights were loaded"))
        with pytest.raises(ConfigError, match="transformers computes no load-balancing loss for Llama4ForCausalLM"):
            trainer(tmp_path / "run", tmp_path / "model", router_aux_loss_coef=0.1)
        tiny_model("llama", **SIZES).save_pretrained(tmp_path / "dense")
        with pytest.raises(ConfigError, match="has no experts to balance"):
            trainer(tmp_path / "run", tmp_path / "dense", router_aux_loss_coef=0.1)


def transformers_llama4(**changes):
    fields = {"hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
    return Llama4TextConfig(**{**fields, **heads, **changes})


def test_a_reward_model_with_experts_has_no_balancing_loss(tmp_path):
    """Its configuration weighs one, and a reward has none."""
    folder = tmp_path / "model"
    tiny_model("mixtral", **SIZES, router_aux_loss_coef=0.1).save_pretrained(folder)
    run = trainer(tmp_path / "run", folder, kind=RewardTrainer, config=RewardConfig)
    run.train()
    assert run.run.router_weight == 0.0
    assert math.isfinite(run.state.log_history[0]["loss"])


def test_noise_is_a_sequences_own():
    """Its size is that of the sequence alone, padding has none, and nothing beside it or after it changes it."""
    ids = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]])
    noise = sequence_noise(ids, (3, 5), 64, 5.0, b"0:1:")
    assert noise[0, 3:].abs().max() == 0
    for row, length in enumerate((3, 5)):
        largest = 5.0 / math.sqrt(length * 64)
        assert 0.9 * largest < noise[row, :length].abs().max() <= largest
        assert noise[row, :length].mean().abs() < 0.2 * largest
    assert torch.equal(sequence_noise(ids[:1, :3], (3,), 64, 5.0, b"0:1:")[0], noise[0, :3])
    assert not torch.equal(sequence_noise(ids[:1, :3], (3,), 64, 5.0, b"0:2:")[0], noise[0, :3])


class Weights(TrainerCallback):
    """Keeps the policy's weights at the end."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_step_with_noise_is_the_same_however_it_is_split(tmp_path):
    """Report: huggingface/transformers#34659. One batch of 8, or 8 of 1; and without noise it is another one."""
    found = []
    for size, alpha in ((8, 5.0), (1, 5.0), (8, None)):
        kept = Weights()
        run = trainer(
            tmp_path / f"{size}-{alpha}",
            tiny_model("llama", **SIZES),
            callbacks=[kept],
            neftune_noise_alpha=alpha,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            learning_rate=1e-2,
            optim="sgd",
            lr_scheduler_type="constant",
        )
        run.train()
        assert run.run.layout == ("tree" if alpha is None else "padded")
        found.append(kept.weights)
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, atol=1e-6, rtol=1e-5)
    assert any(not torch.allclose(found[2][name], whole, atol=1e-6) for name, whole in found[0].items())


def test_noise_in_a_packed_row_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"neftune_noise_alpha.*a packed row was asked for"):
        trainer(tmp_path, tiny_model("llama", **SIZES), neftune_noise_alpha=5.0, scoring_layout="tree")


def test_a_policy_in_a_data_parallel_is_named_as_that(tmp_path):
    with pytest.raises(ConfigError, match=r"in a torch\.nn\.DataParallel.*torchrun"):
        DPOTrainer(
            torch.nn.DataParallel(tiny_model()),
            args=DPOConfig(output_dir=str(tmp_path), **QUIET),
            train_dataset=pair_rows(4),
            processing_class=tiny_tokenizer(),
        )


@pytest.mark.parametrize("device", ["cuda:7", "mps", "xla", "hpu"])
def test_a_device_that_is_not_here_is_named_before_weights_are_read(device, tmp_path):
    if torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == device.partition(":")[0]:
        pytest.skip("it is here")
    with pytest.raises(ConfigError, match=rf"device_map is '{device}', a device on which torch cannot compute here"):
        specs.ModelSpec.of("nowhere", {"device_map": device}).require_device()


def test_a_device_without_values_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="device_map is 'meta'; allowed are"):
        specs.ModelSpec.of("nowhere", {"device_map": "meta"})
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    with pytest.raises(ConfigError, match="ACCELERATE_TORCH_DEVICE is meta in the environment"):
        DPOConfig(output_dir=str(tmp_path), **QUIET)


def test_a_precision_that_the_launcher_was_told_is_one_that_can_be(tmp_path, monkeypatch):
    """On a CPU it was called float16, and computed in float32."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ConfigError, match=r"fp16.*asked for by the launcher.*a CPU, which has no float16"):
        DPOConfig(output_dir=str(tmp_path), **QUIET)
    assert DPOConfig(output_dir=str(tmp_path), bf16=True, **QUIET).mixed_precision == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert DPOConfig(output_dir=str(tmp_path), **QUIET).mixed_precision == "bf16"


@pytest.mark.parametrize("names", ["foo", ["none", "tensorboard"]])
def test_a_tracker_that_is_none_is_refused(names, tmp_path):
    """transformers' error was called a bug."""
    with pytest.raises(ConfigError, match=r"report_to.*is not supported, only .*tensorboard"):
        trainer(tmp_path, tiny_model("llama", **SIZES), report_to=names)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs is None .*min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs .*num_decay_steps"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"nope": 1}}, "lr_scheduler_kwargs .*'nope'"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}, "lr_end .* must be smaller"),
        ({"dataloader_persistent_workers": True}, "dataloader_num_workers is 0: persistent_workers"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1: .*non-negative"),
        ({"save_strategy": "best"}, "metric_for_best_model is None. save_strategy is best"),
        ({"output_dir": ""}, "output_dir is ''. Name a folder"),
        ({"save_strategy": "steps", "save_steps": 0}, "save_steps is 0. Nothing would be saved"),
        ({"adam_epsilon": 0.0}, r"adam_epsilon is 0\.0. A weight without a gradient"),
        ({"max_steps": 2.5}, r"max_steps is 2\.5. It must be a whole number"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast', which is not a number"),
        ({"learning_rate": "-1e-3"}, r"learning_rate is -0\.001; it must be"),
    ],
)
def test_values_that_a_library_would_refuse_late_are_refused_before_weights_load(options, said, tmp_path):
    """They ended a run after its model was loaded, in an error of Python that was called a bug."""
    with pytest.raises(ConfigError, match=said):
        DPOTrainer(
            "/no/such/model",
            args=DPOConfig(**{"output_dir": str(tmp_path), **QUIET, **options}),
            train_dataset=pair_rows(4),
            processing_class=tiny_tokenizer(),
        )


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        ("linear", None),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("warmup_stable_decay", {"num_decay_steps": 1}),
        ("constant", None),
        ("constant_with_warmup", None),
        ("polynomial", {"lr_end": 1e-5}),
    ],
)
def test_schedules_are_taken_as_they_are_and_one_without_a_warm_up_says_so(kind, kwargs, tmp_path, caplog):
    args = DPOConfig(
        output_dir=str(tmp_path),
        max_steps=10,
        warmup_steps=4,
        learning_rate="1e-3",
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=kwargs,
        **QUIET,
    )
    assert args.learning_rate == 1e-3
    check_before_loading(args)
    assert ("has no warm-up" in caplog.text) == (kind == "constant")
