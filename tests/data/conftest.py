"""The tokenizers that most tests of the data room use."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from data.samples import byte_level, chat_tokenizer, metaspace


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without BOS, as GPT-2 has."""
    return byte_level(eos_token="<eos>")


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    """The same with a ChatML template, as Qwen and SmolLM2 have."""
    return chat_tokenizer()


@pytest.fixture(scope="session")
def space_tokenizer() -> PreTrainedTokenizerFast:
    """A space before every text and a BOS token, as Llama 2 has."""
    return metaspace()
