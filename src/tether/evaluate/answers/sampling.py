"""Answers to prompts by models that were named: each draw depends on seed, prompt and model alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from datasets import Dataset

from tether.data import example_from_row, load_rows, preferences, prepare, read_preferences
from tether.data.sources.load import load_of_kind
from tether.errors import ConfigError
from tether.evaluate.named_models import Loaded
from tether.models.structure import transformers_model
from tether.progress import each
from tether.rollout import RolloutRequest, Sampling, TransformersEngine
from tether.rollout.sample import stop_ids
from tether.types import Kind

_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Generation:
    """How answers are drawn.

    Args:
        max_new_tokens: most tokens of an answer.
        temperature: 0 takes the most likely token each time.
        top_p: draw among the fewest tokens that hold this share of the probability.
        seed: of the draws.

    Raises:
        ConfigError: a value out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"max_new_tokens {self.max_new_tokens}, temperature {self.temperature}, top_p {self.top_p}; allowed "
                "are at least 1, at least 0, and above 0 and at most 1."
            )

    def words(self) -> str:
        """For a person."""
        if self.temperature == 0:
            return f"at most {self.max_new_tokens} tokens, the most likely each time"
        nucleus = f", top_p {self.top_p:g}" if self.top_p < 1 else ""
        return f"at most {self.max_new_tokens} tokens, temperature {self.temperature:g}{nucleus}, seed {self.seed}"

    def sampling(self, stop_ids: tuple[int, ...]) -> Sampling:
        """As an engine takes it."""
        greedy = self.temperature == 0
        return Sampling(
            1.0 if greedy else self.temperature,
            self.max_new_tokens,
            stop_ids,
            top_k=1 if greedy else 0,
            top_p=1.0 if greedy else self.top_p,
            seed=self.seed,
        )


def prompt_rows(source: Any, first: int | None = None) -> Dataset:
    """The prompts of rows of any kind, each once, with what a chat template takes beside them.

    Args:
        source: rows, see `tether.data.load_rows`.
        first: only so many prompts.
    """
    rows, kind = load_of_kind(source, name="data")
    records = preferences(rows, read_preferences(rows, kind=kind, name="data"))
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        prompt = record.prompt
        if not prompt and record.completions and not isinstance(record.completions[0], str):
            # A conversation that is trained on as a whole: what comes before the first answer is the prompt.
            prompt = list(takewhile(lambda message: message.get("role") != "assistant", record.completions[0]))
        if prompt:
            row: dict[str, Any] = {"prompt": prompt} | ({"tools": record.tools} if record.tools else {})
            found.setdefault(str(row), row)
    if not found:
        raise ConfigError("The rows have no prompts that a model could answer. Give rows with a column `prompt`.")
    return _as_prompts(list(found.values())[:first])


def typed_prompts(texts: Sequence[str], *, chat: bool) -> Dataset:
    """Prompts that were typed: as a user's message for models that are talked to, else as the text itself."""
    return _as_prompts([{"prompt": [{"role": "user", "content": text}] if chat else text} for text in texts])


def _as_prompts(rows: list[dict[str, Any]]) -> Dataset:
    kind: Kind = "prompt_only"
    return load_rows(rows, kind=kind, name="data")


def talks(loaded: Loaded) -> bool:
    """Whether a prompt is a message to this model: as its run's rows were; without a run, if it has a template."""
    trained = loaded.named.trained
    if trained is not None and trained.conversational is not None:
        return trained.conversational
    return bool(loaded.tokenizer.chat_template)


def answer(loaded: Loaded, prompts: Dataset, generation: Generation) -> list[str]:
    """One answer to each prompt, without special tokens.

    Args:
        loaded: the model.
        prompts: see `prompt_rows`.
        generation: how answers are drawn.

    Raises:
        ConfigError: a reward model, which writes nothing.
        DataError: the model has no chat template for a conversation.
    """
    if loaded.named.classifies:
        raise ConfigError(f"'{loaded.named.name}' is a reward model, which writes nothing. Name a language model.")
    model = transformers_model(loaded.model)
    encodes = bool(model.config.is_encoder_decoder)
    prepared = prepare(
        prompts, loaded.processing, max_length=None, kind="prompt_only", encoder_decoder=encodes, name="prompts"
    )
    examples = [example_from_row(prepared.dataset[place]) for place in range(len(prepared.dataset))]
    requests = [RolloutRequest(one.prompt_ids, one.source_row, range(1)) for one in examples]
    chat = any(not isinstance(prompt, str) for prompt in prompts["prompt"])
    ends = stop_ids(model.generation_config, loaded.processing, chat=chat)
    sampling = generation.sampling(ends)
    order = sorted(range(len(requests)), key=lambda place: -len(requests[place].prompt_ids))
    chunks = [order[start : start + _ROWS_AT_ONCE] for start in range(0, len(order), _ROWS_AT_ONCE)]
    texts = [""] * len(prompts)
    for chunk in each(chunks, f"sampling from {loaded.named.name}"):
        with loaded.in_effect():
            groups = TransformersEngine().generate(loaded.model, [requests[place] for place in chunk], sampling)
        for group in groups:
            ids = group.completions[0].ids
            texts[group.request.source_row] = str(loaded.tokenizer.decode(ids, skip_special_tokens=True))
    return texts
