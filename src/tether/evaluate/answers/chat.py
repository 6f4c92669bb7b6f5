"""A conversation with a model and with what it was trained against: each goes on from its own answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tether.data import load_rows
from tether.evaluate.answers.sampling import Generation, answer, talks
from tether.evaluate.named_models import Loaded


@dataclass
class Conversation:
    """What was said so far.

    Args:
        speakers: the models, in the order in which they answer.
        generation: how answers are drawn.
        system: what stands before everything; None: nothing, or what the template adds.
    """

    speakers: tuple[Loaded, ...]
    generation: Generation
    system: str | None = None
    _messages: list[list[dict[str, str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.restart()

    @property
    def chat(self) -> bool:
        """Whether messages are exchanged; a model of text alone goes on with each line that it gets."""
        return talks(self.speakers[0])

    def restart(self) -> None:
        """Forget everything but the system prompt."""
        opening = [{"role": "system", "content": self.system}] if self.system is not None else []
        self._messages = [list(opening) for _ in self.speakers]

    def say(self, text: str) -> Iterator[tuple[str, str]]:
        """Put a line to every model.

        Args:
            text: the line.

        Yields:
            Each model's name and its answer, as soon as it is there.
        """
        for speaker, messages in zip(self.speakers, self._messages, strict=True):
            prompt: Any = text
            if self.chat:
                messages.append({"role": "user", "content": text})
                prompt = list(messages)
            rows = load_rows([{"prompt": prompt}], kind="prompt_only", name="data")
            said = answer(speaker, rows, self.generation)[0]
            if self.chat:
                messages.append({"role": "assistant", "content": said})
            yield speaker.named.name, said
