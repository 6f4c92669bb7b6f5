"""Looking words up gives the ids that tokenising the text gives, and is used only where it must."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.samples import CHATML, TEXTS, chat_tokenizer
from tether.data.text.token_cache import WordMemory, _parts, cuts_at_words, tokens_apart
from tether.data.text.tokenize import Encoder

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ACROSS = r"\p{L}+(?: \p{L}+)?|\s+|[^\s\p{L}]+"  # pieces of two words, as in tokenizers that merge across spaces
CORPUS = [*TEXTS, "the sea and the sky, the sea's edge; in the end we'd go\n\nto the sea  again. Été à la mer" * 3]


def backend(cutter, **changes):
    tokenizer = Tokenizer(models.BPE(**changes.pop("model", {})))
    tokenizer.pre_tokenizer = cutter
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def byte_level(**options):
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(use_regex=False)])


def texts(count, seed=0):
    """Words, and what stands between and inside them in real text."""
    draw = random.Random(seed)
    words = [
        "the",
        "sea",
        "Sky",
        "it's",
        "I'd",
        "a",
        "Été",
        "naïve",
        "42",
        "x2",
        "<s>",
        "(or)",
        "e\u0301",
        "\u4e2d\u6587",
        "\U0001f600",
    ]
    gaps = [" "] * 12 + ["  ", "\n", "\n\n", "\t", ", ", ". ", " - ", "", "\u00a0", " \n "]
    return ["".join(draw.choice(words) + draw.choice(gaps) for _ in range(draw.randrange(40))) for _ in range(count)]


@pytest.mark.parametrize(
    "made",
    [
        backend(byte_level()),
        backend(split(LLAMA3)),
        backend(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])),
        backend(byte_level(), normalizer=normalizers.NFC()),
    ],
    ids=["gpt2", "llama3", "smollm", "normalised"],
)
def test_ids_are_those_of_the_whole_text(made):
    """On texts of words, punctuation, spaces, line breaks, accents and special tokens; the second time from memory."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    calls = []

    def plain(some):
        calls.append(len(some))
        return tokenizer(list(some), add_special_tokens=False)["input_ids"] if some else []

    memory = WordMemory.of(tokenizer, plain)
    assert memory is not None
    for seed in range(3):
        some = [*texts(200, seed), *CORPUS, "", " ", "a", " a b"]
        assert memory.encode(some) == tokenizer(some, add_special_tokens=False)["input_ids"]
    calls.clear()
    memory.encode(texts(200, 0))
    assert sum(calls) == 0, "everything was known"


@pytest.mark.parametrize(
    "made",
    [
        backend(split(ACROSS)),
        backend(byte_level(add_prefix_space=True)),
        backend(byte_level(), normalizer=normalizers.Lowercase()),
        backend(pre_tokenizers.Metaspace()),
        backend(byte_level(), model={"dropout": 0.1}),
        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
    ],
    ids=["across words", "prefix space", "lower case", "metaspace", "dropout", "no byte-level BPE"],
)
def test_other_tokenizers_go_the_plain_way(made):
    assert not cuts_at_words(made)


@pytest.mark.parametrize(
    "token", [AddedToken("new york"), AddedToken("end", lstrip=True), AddedToken("a", single_word=True)]
)
def test_added_tokens_that_reach_across_words_go_the_plain_way(token):
    made = backend(byte_level())
    made.add_tokens([token])
    assert not cuts_at_words(made)


def test_a_wrong_cut_would_be_seen(monkeypatch):
    """Negative control: with a tokenizer that merges across words, the check of the first batch falls back."""
    monkeypatch.setattr("tether.data.text.token_cache.cuts_at_words", lambda made: True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend(split(ACROSS)), bos_token="<s>", eos_token="</s>")
    encoder = Encoder(tokenizer)
    some = texts(50)
    assert encoder.encode(some) == tokenizer(some, add_special_tokens=False)["input_ids"]
    assert encoder._words is None


def test_nothing_to_encode_forgets_nothing():
    encoder = Encoder(chat_tokenizer(CHATML))
    known = encoder._words
    assert encoder.encode([]) == []
    assert encoder._words is known


def marked(*tokens, **options):
    made = backend(byte_level(), **options)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def memory_of(tokenizer, seen=None):
    def plain(some):
        if seen is not None:
            seen.update(some)
        return tokenizer(list(some), add_special_tokens=False)["input_ids"] if some else []

    return WordMemory.of(tokenizer, plain)


@pytest.mark.parametrize("joint", ["", " ", "\n", "<|end|>", "<|e", "<|end|>\n<|end|> "])
def test_completions_after_their_prompt_have_the_ids_of_the_whole(joint):
    """Wherever the prompt is cut off: in a word, before a space, inside a control token or a longer one."""
    tokenizer = marked("<|end|>", "<|end|>nd|>", "nd|>")
    some = []
    for prompt in (*texts(100, 5), "the sea<", "the sea <|e", "sea <|end|>", "the", ""):
        some += [prompt + joint, *(prompt + joint + end for end in ("nd|> a sea", " the sea", "the  sea", "", "é a b"))]
    memory = memory_of(tokenizer)
    memory._to_check = 0
    assert memory.encode(some) == tokenizer(some, add_special_tokens=False)["input_ids"]


def test_a_prompt_is_cut_up_once():
    """What its completions have in common with it is not looked up again: only parts from its last cut on are."""
    seen: set[str] = set()
    memory = memory_of(marked("<|end|>"), seen)
    memory.encode(["the sea and the", "the sea and the sky", "the sea and the sky was blue", "a boat"])
    parts, begins = _parts(["the sea and the", "the sea and the sky", "the sea and they were", "a boat"])
    assert begins == [None, 0, 0, None]
    assert parts[1:3] == [["the", "sky"], ["they", "were"]]
    assert " sky" in seen
    assert "the sea and the sky" in seen, "the first texts are still compared with the plain way"


def test_control_tokens_stand_apart():
    """`word<|end|>word` is made of what was seen before: no text is tokenised for it."""
    seen: set[str] = set()
    memory = memory_of(marked("<|end|>"), seen)
    memory._to_check = 0
    memory.encode(["a sea<|end|>", "sky", "b<|end|>sky c"])
    seen.clear()
    assert memory.encode(["a sea<|end|>sky c"]) == memory_of(marked("<|end|>")).encode(["a sea<|end|>sky c"])
    assert not seen


def test_tokens_that_are_not_looked_for_first_stay_in_their_part():
    made = backend(byte_level(), normalizer=normalizers.NFC())
    made.add_tokens([AddedToken("<n>", normalized=True), AddedToken("<p>", normalized=False)])
    assert "<n>" not in tokens_apart(made)
    assert "<p>" in tokens_apart(made)
    made.encode_special_tokens = True
    assert tokens_apart(made) == ()


def test_a_wrong_prefix_would_be_seen(monkeypatch):
    """Negative control: with prompts taken over whole, tokens that join prompt and completion are missed."""

    def careless(texts):
        return [["the", "sea"], [text.removeprefix("the sea") for text in texts[1:]]], [None, 0]

    monkeypatch.setattr("tether.data.text.token_cache._parts", careless)
    assert memory_of(marked("<|end|>")).encode(["the sea", "the seas"]) is None
