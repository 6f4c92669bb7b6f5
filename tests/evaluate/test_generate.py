"""Generation in batches: what is sampled depends on the model, the prompts and the seed, and on nothing else."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from tether.errors import ConfigError
from tether.evaluate.generate import generate
from tiny import tiny_model, tiny_tokenizer
from tiny_seq2seq import tiny_seq2seq, tiny_seq2seq_tokenizer

PROMPTS = ["the film", "I", "the film was good and the film was bad", "I did not like it", "was it"]
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A model of the tokenizer's vocabulary."""
    return tiny_model(vocab_size=len(TOKENIZER), eos_token_id=2)


def greedy_alone(model: PreTrainedModel, prompt: str, tokens: int) -> str:
    """The most likely continuation, token by token, without a batch, padding or a cache."""
    ids = TOKENIZER(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(tokens):
            following = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            if following.item() == TOKENIZER.eos_token_id:
                break
            ids = torch.cat([ids, following], dim=1)
    return TOKENIZER.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_greedy_continuations_are_those_of_each_prompt_alone(model: PreTrainedModel, batch_size: int):
    texts = generate(model, TOKENIZER, PROMPTS, max_new_tokens=6, temperature=0, batch_size=batch_size)
    assert texts == [greedy_alone(model, prompt, 6) for prompt in PROMPTS]


def test_padding_with_the_end_token_changes_nothing(model: PreTrainedModel):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    texts = generate(model, tokenizer, PROMPTS, max_new_tokens=6, temperature=0)
    assert texts == generate(model, TOKENIZER, PROMPTS, max_new_tokens=6, temperature=0)


def test_samples_depend_on_the_seed_only(model: PreTrainedModel):
    first = generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, seed=1)
    torch.manual_seed(99)
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, seed=1) == first
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, seed=2) != first


def test_settings_of_the_checkpoint_do_not_leak_in(model: PreTrainedModel):
    expected = generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, seed=1)
    other = tiny_model(vocab_size=len(TOKENIZER), eos_token_id=2)
    other.generation_config.update(temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=5.0, do_sample=True)
    assert generate(other, TOKENIZER, PROMPTS, max_new_tokens=8, seed=1) == expected


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_narrowest_sampling_is_greedy(model: PreTrainedModel, narrow: dict):
    greedy = generate(model, TOKENIZER, PROMPTS, max_new_tokens=6, temperature=0)
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=6, **narrow) == greedy


def test_a_peft_model_samples_with_its_adapter(model: PreTrainedModel):
    wrapped = get_peft_model(
        tiny_model(vocab_size=len(TOKENIZER), eos_token_id=2),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    )
    without = generate(model, TOKENIZER, PROMPTS, max_new_tokens=6, temperature=0)
    assert generate(wrapped, TOKENIZER, PROMPTS, max_new_tokens=6, temperature=0) != without
    with wrapped.disable_adapter():
        assert generate(wrapped, TOKENIZER, PROMPTS, max_new_tokens=6, temperature=0) == without


def test_modes_and_random_state_are_left_as_they_were(model: PreTrainedModel):
    model.train()
    model.model.layers[0].eval()
    before, state = [module.training for module in model.modules()], torch.get_rng_state()
    generate(model, TOKENIZER, PROMPTS, max_new_tokens=2)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert TOKENIZER.padding_side == "right"


def test_no_prompts_give_no_texts(model: PreTrainedModel):
    assert generate(model, TOKENIZER, []) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("one text", {}, "put it in a list"),
        (["a", ""], {}, "Prompt 1 is empty"),
        (["a"], {"temperature": -1.0}, "temperature is -1.0. Allowed"),
        (["a"], {"top_p": 0.0}, "top_p is 0.0. Allowed"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens is 0. Allowed"),
    ],
)
def test_refuses(model: PreTrainedModel, prompts: list[str], options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        generate(model, TOKENIZER, prompts, **options)


def test_a_forced_last_token_of_the_checkpoint_does_not_leak_in(model: PreTrainedModel):
    """BART's settings force an end at the last place: what is not said would be filled in by `generate`."""
    plain = generate(model, TOKENIZER, PROMPTS, max_new_tokens=4, temperature=0)
    model.generation_config.forced_eos_token_id = 20
    model.generation_config.suppress_tokens = list(range(30, 60))
    try:
        assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=4, temperature=0) == plain
        assert model.generation_config.forced_eos_token_id == 20
    finally:
        model.generation_config.forced_eos_token_id = model.generation_config.suppress_tokens = None


def test_an_encoder_decoder_gives_what_its_decoder_wrote():
    """Greedy, against the most likely tokens of plain forwards."""
    model, tokenizer = tiny_seq2seq("bart", vocab_size=384).eval(), tiny_seq2seq_tokenizer("t5")
    writes = torch.zeros(384, dtype=torch.bool)
    writes[[tokenizer.eos_token_id, *tokenizer("a readable text")["input_ids"]]] = True
    model.final_logits_bias[:, ~writes] = -1e4
    model.generation_config.forced_eos_token_id = None
    prompts = ["a short one", "and one that is longer"]
    expected = []
    for prompt in prompts:
        ids = [model.config.decoder_start_token_id]
        source = torch.tensor([tokenizer(prompt)["input_ids"]])
        for _ in range(8):
            with torch.no_grad():
                logits = model(input_ids=source, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        expected.append(tokenizer.decode(ids, skip_special_tokens=True))
    assert generate(model, tokenizer, prompts, temperature=0, max_new_tokens=8) == expected
    assert all(expected)
