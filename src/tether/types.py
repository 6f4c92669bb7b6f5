"""The records that flow through Tether, from a row of preferences to a loss.

    row -> Preference -> Example -> ScoringBatch -> Scores -> LossOutput

Vocabulary, two levels: `token_logps [N]` has one value per completion token, `logps [K]` one per completion.
Log-probabilities are natural logarithms (nats) in float32. K counts completions, N scored tokens, T tokens in a
packed row, B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Messages = list[dict[str, Any]]
Kind = Literal["pair", "ranked", "unpaired", "completion", "prompt_only"]
Meaning = Literal["start", "base", "model", "adapter", "none"]
Over = Literal["examples", "completions", "tokens", "constant"]
Method = Literal["adapter_off", "adapter_on", "snapshot", "model", "remote", "store", "none"]
# One number for each of B examples, K completions, N scored tokens. The tests check shapes wherever such a name stands.
PerExample: TypeAlias = Float[Tensor, " B"]
PerCompletion: TypeAlias = Float[Tensor, " K"]
PerToken: TypeAlias = Float[Tensor, " N"]
Sum: TypeAlias = tuple[Tensor, Tensor]  # of what a metric is the mean of, and their count
Metrics: TypeAlias = dict[str, Sum]


@dataclass(frozen=True)
class Preference:
    """One row of preference data after the schema check, before any tokenizer.

    Args:
        prompt: text, or a list of chat messages.
        completions: text or messages like `prompt`. For `kind="pair"` the chosen and the rejected one, in that order;
            for `ranked` the best first; for `unpaired` and `completion` one; for `prompt_only` none.
        kind: what the completions mean to each other.
        source_row: number of the row in the data it came from, starting at 0.
        values: numbers that belong to the row, by name: `label` (1 desirable, 0 undesirable) of an `unpaired` one;
            `weight` and `margin` where the data gives them.
        tools: JSON schemas of the tools that the chat template shows the model; None for none.
        chat_template_kwargs: further arguments of the chat template, for this row.

    Examples:
        >>> row = Preference(prompt="2 + 2 =", completions=(" 4", " 5"), kind="pair", source_row=0)
        >>> row.completions[0]
        ' 4'
    """

    prompt: str | Messages
    completions: tuple[str | Messages, ...]
    kind: Kind
    source_row: int
    values: Mapping[str, float] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageInputs:
    """What a processor made of the images of one prompt: what the model is given beside its token ids.

    Args:
        tensors: by the name of the model's argument, images one after another in the first dimension: `pixel_values`,
            and for some models `image_grid_thw [images, 3]` or `image_sizes [images, 2]`.
        token_types: int64 `[P]`, 1 for prompt tokens that stand for a part of an image, else 0.
        type_names: the model's arguments that `token_types` is for; empty for models that find the tokens by their id.

    Examples:
        >>> images = ImageInputs({"pixel_values": torch.zeros(1, 3, 4, 4)}, torch.tensor([0, 1, 1, 0]))
        >>> len(images.digest)
        16
    """

    tensors: Mapping[str, Tensor]
    token_types: Int[Tensor, " P"]
    type_names: tuple[str, ...] = ()

    @property
    def digest(self) -> bytes:
        """Of what the model sees: pixels after resizing, not the file they came from."""
        whole = blake2b(digest_size=16)
        for name, tensor in sorted(self.tensors.items()):
            whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            whole.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return whole.digest()

    def to(self, device: torch.device | str) -> ImageInputs:
        """The same with its tensors on `device`."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return replace(self, tensors=moved, token_types=self.token_types.to(device, non_blocking=True))


@dataclass(frozen=True)
class Example:
    """A tokenised, truncated preference: one prompt and its K completions.

    Args:
        prompt_ids: int64 `[P]`; empty only where the first token of each completion is not scored, since nothing
            predicts it.
        completion_ids: K int64 tensors `[C_k]`, each at least one token and ending in the end-of-turn token
            unless truncation removed it.
        source_row: number of the row in the data it came from.
        values: numbers that belong to the example, by name, see `Preference`.
        scored: K bool tensors `[C_k]`, True for completion tokens that are scored; None when all are. It leaves out
            what the model did not write, such as the user's turns inside a conversation.
        images: of the prompt, for vision-language models; None for none.
        completion_values: float32 `[K]` each, by name: what belongs to a completion, such as its advantage.
        token_values: K float32 tensors `[C_k]` each, by name: what belongs to a token, such as the log-probability that
            it was sampled with.

    Examples:
        >>> example = Example.of([1, 5, 6], [[7, 2], [8, 9, 2]])
        >>> [len(ids) for ids in example.completion_ids]
        [2, 3]
        >>> example.keys[0] == Example.of([1, 5, 6], [[7, 2]]).keys[0]
        True
    """

    prompt_ids: Int[Tensor, " P"]
    completion_ids: tuple[Int[Tensor, " _"], ...]
    source_row: int = -1
    values: Mapping[str, float] = field(default_factory=dict)
    scored: tuple[Bool[Tensor, " _"], ...] | None = None
    images: ImageInputs | None = None
    completion_values: Mapping[str, PerCompletion] = field(default_factory=dict)
    token_values: Mapping[str, tuple[Float[Tensor, " _"], ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        prompt_ids: list[int],
        completion_ids: list[list[int]],
        source_row: int = -1,
        *,
        values: Mapping[str, float] | None = None,
        scored: list[list[bool]] | None = None,
        images: ImageInputs | None = None,
    ) -> Example:
        """Build an example from plain lists of token ids."""
        return cls(
            torch.as_tensor(prompt_ids, dtype=torch.int64),
            tuple(torch.as_tensor(ids, dtype=torch.int64) for ids in completion_ids),
            source_row,
            values or {},
            None if scored is None else tuple(torch.as_tensor(mask, dtype=torch.bool) for mask in scored),
            images,
        )

    @property
    def keys(self) -> tuple[bytes, ...]:
        """K digests of exactly what a model is asked: images, the ids of prompt and completion, which are scored."""
        prompt = self.prompt_ids.numpy().tobytes()
        head = len(self.prompt_ids).to_bytes(8, "little") + prompt
        digests = [blake2b(head + ids.numpy().tobytes(), digest_size=16) for ids in self.completion_ids]
        for digest, mask in zip(digests, self.scored or (), strict=False):
            if not mask.all():
                digest.update(b"scored" + mask.numpy().tobytes())
        if self.images is not None:
            seen = self.images.digest
            for digest in digests:
                digest.update(b"images" + seen)
        return tuple(digest.digest() for digest in digests)


@dataclass(frozen=True)
class Tree:
    """Where one prompt and its completions lie in a packed row: the trunk, then the branches, without gaps.

    A trunk may be empty; the branches then have nothing in common.

    Examples:
        >>> tree = Tree(start=0, trunk=3, branches=(2, 4))
        >>> tree.spans(), tree.end
        (((0, 3), (3, 5), (5, 9)), 9)
    """

    start: int
    trunk: int
    branches: tuple[int, ...]

    @property
    def end(self) -> int:
        """Index after the last token of the tree."""
        return self.start + self.trunk + sum(self.branches)

    def spans(self) -> tuple[tuple[int, int], ...]:
        """`(start, end)` of the trunk, then of each branch."""
        edges = [self.start]
        for length in (self.trunk, *self.branches):
            edges.append(edges[-1] + length)
        return tuple(pairwise(edges))


@dataclass(frozen=True)
class Forest:
    """The trees of a packed row, in order and without gaps.

    `cache` holds tensors that attention derives from the layout once per micro-batch (masks); it is not part of the
    forest's value.

    Examples:
        >>> forest = Forest((Tree(0, 3, (2, 4)), Tree(9, 1, (1,))))
        >>> forest.length
        11
    """

    trees: tuple[Tree, ...]
    cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def length(self) -> int:
        """Tokens in the row, T."""
        return self.trees[-1].end


@dataclass(frozen=True)
class ScoringBatch:
    """A micro-batch as a forest packed in one row without padding.

    Examples with one prompt share a tree, and completions with the same tokens after it share a branch; the completions
    are numbered in the order of the examples all the same.

    Args:
        input_ids: int64 `[1, T]`.
        position_ids: int64 `[1, T]`; restart at 0 in each tree, every branch starts at its trunk's length.
        forest: where trunks and branches lie.
        sources: int64 `[N]`, index in the row whose hidden state predicts a scored token.
        targets: int64 `[N]`, the token predicted.
        completion_index: int64 `[N]`, which of the K completions a scored token belongs to.
        keys: K content digests, see `Example.keys`.
        branches: K pairs `(tree, branch)`, where in the forest each completion lies.
        examples: the B examples, as they came; what splits a batch packs some of them again.
        values: float32 `[B]` each, by name, see `Preference`.
        completion_values: float32 `[K]` each, by name, see `Example`.
        token_values: float32 `[N]` each, by name, of the scored tokens.
        images: of the prompt of each tree, or None for one without; empty where no prompt has any.

    Examples:
        A prompt `[1, 5]` with completions `[7, 2]` and `[8]`:

        >>> from tether.scoring import pack
        >>> batch = pack([Example.of([1, 5], [[7, 2], [8]])])
        >>> batch.input_ids.tolist(), batch.position_ids.tolist()
        ([[1, 5, 7, 2, 8]], [[0, 1, 2, 3, 2]])
        >>> batch.sources.tolist(), batch.targets.tolist(), batch.completion_index.tolist()
        ([1, 2, 1], [7, 2, 8], [0, 0, 1])
        >>> batch.branches
        ((0, 0), (0, 1))
    """

    input_ids: Int[Tensor, "1 T"]
    position_ids: Int[Tensor, "1 T"]
    forest: Forest
    sources: Int[Tensor, " N"]
    targets: Int[Tensor, " N"]
    completion_index: Int[Tensor, " N"]
    keys: tuple[bytes, ...]
    branches: tuple[tuple[int, int], ...]
    examples: tuple[Example, ...]
    values: Mapping[str, PerExample] = field(default_factory=dict)
    completion_values: Mapping[str, PerCompletion] = field(default_factory=dict)
    token_values: Mapping[str, PerToken] = field(default_factory=dict)
    images: tuple[ImageInputs | None, ...] = ()

    @property
    def num_examples(self) -> int:
        """B."""
        return len(self.examples)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Completions of each of the B examples."""
        return tuple(len(example.completion_ids) for example in self.examples)

    @property
    def num_completions(self) -> int:
        """K."""
        return len(self.keys)

    @property
    def sequence_lengths(self) -> tuple[int, ...]:
        """Tokens of each of the K full sequences, prompt and completion together."""
        trees = self.forest.trees
        return tuple(trees[tree].trunk + trees[tree].branches[branch] for tree, branch in self.branches)

    def to(self, device: torch.device | str) -> ScoringBatch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {}
        for name, value in self.__dict__.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=True)
            elif isinstance(value, Mapping):
                moved[name] = {key: tensor.to(device, non_blocking=True) for key, tensor in value.items()}
        images = tuple(image if image is None else image.to(device) for image in self.images)
        return replace(self, **moved, images=images)


@dataclass(frozen=True)
class Scores:
    """What a model says of the completion tokens of a `ScoringBatch`.

    Args:
        token_logps: float32 `[N]`, log-probability of each completion token, in nats.
        completion_index: int64 `[N]`.
        num_completions: K.
        entropy: float32 `[N]`, entropy in nats of the distribution each token was drawn from; None unless asked for.
        top1: bool `[N]`, True where the token is the most likely one; None unless asked for.
        mean_logits: float32 `[N]`, mean logit over the vocabulary; None unless asked for.
        log_collision: float32 `[N]` nats, log of the sum of squared probabilities, which is the log-probability that
            two draws agree; None unless asked for.
        hidden: `[N, hidden_size]`, the state before the head that predicts each token; None unless asked for.
        head: what makes logits `[M, vocabulary]` of such states `[M, hidden_size]`; given with `hidden`.
        aux_loss: scalar, the load-balancing loss of the batch's routers; None unless asked for.

    Examples:
        >>> scores = Scores(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 0, 1]), 2)
        >>> scores.logps.tolist(), scores.mean_logps.tolist(), scores.lengths.tolist()
        ([-3.0, -4.0], [-1.5, -4.0], [2, 1])
    """

    token_logps: PerToken
    completion_index: Int[Tensor, " N"]
    num_completions: int
    entropy: PerToken | None = None
    top1: Bool[Tensor, " N"] | None = None
    mean_logits: PerToken | None = None
    log_collision: PerToken | None = None
    hidden: Float[Tensor, "N hidden_size"] | None = None
    head: Callable[[Tensor], Tensor] | None = None
    aux_loss: Float[Tensor, ""] | None = None

    def sum_by_completion(self, values: PerToken) -> PerCompletion:
        """Sum `values [N]` over the tokens of each completion: `[K]`, in float32 or better."""
        values = values if values.dtype == torch.float64 else values.float()
        return values.new_zeros(self.num_completions).index_add(0, self.completion_index, values)

    @property
    def logps(self) -> PerCompletion:
        """Log-probability of each completion, `[K]`."""
        return self.sum_by_completion(self.token_logps)

    @property
    def lengths(self) -> Int[Tensor, " K"]:
        """Tokens of each completion, int64 `[K]`."""
        return torch.bincount(self.completion_index, minlength=self.num_completions)

    @property
    def mean_logps(self) -> PerCompletion:
        """Mean log-probability per token of each completion, `[K]`."""
        return self.logps / self.lengths.clamp(min=1)


@dataclass(frozen=True)
class LossTerm:
    """A part of a loss, not reduced.

    Args:
        values: float, one for each of what it is averaged over.
        over: `examples` `[B]`, `completions` `[K]` or `tokens` `[M]` of a step (the likelihood of chosen completions,
            say); `constant`: the values are summed as they stand, divided by something that the objective knows.

    Examples:
        >>> LossTerm(torch.tensor([0.5, 1.5])).over
        'examples'
    """

    values: Float[Tensor, " V"]
    over: Over = "examples"


@dataclass(frozen=True)
class LossOutput:
    """An objective's answer: losses that are not reduced, and what to report.

    The loss of a step is the sum of its terms' means, each over all examples (or tokens, …) of the step.

    Args:
        terms: parts of the loss, each averaged over something of its own.
        metrics: name to `(sum, count)`, both detached; the mean over a step is the quotient of the summed parts.
        predictions: name to a number for each example, detached, where an evaluation hands them to a function.

    Examples:
        >>> output = LossOutput((LossTerm(torch.tensor([0.5, 1.5])),), {})
        >>> [(term.over, term.values.mean().item()) for term in output.terms]
        [('examples', 1.0)]
    """

    terms: tuple[LossTerm, ...]
    metrics: Metrics
    predictions: Mapping[str, PerExample] = field(default_factory=dict)

    def values(self, over: Over = "examples") -> Float[Tensor, " V"] | None:
        """The term that is averaged over something; None when there is none."""
        return next((term.values for term in self.terms if term.over == over), None)


@dataclass(frozen=True)
class ReferenceIdentity:
    """Which reference a run is tethered to; printed, stored in the run folder and in every checkpoint.

    Args:
        meaning: what the user declared.
        method: how it is computed.
        source: name or path the weights came from, or what object they were.
        revision: commit of the source where it has one.
        dtype: dtype of the weights.
        fingerprint: content hash of the weights that define it; empty for `none`. It belongs to what the reference
            computes and not to the method, so that two methods of one meaning have one fingerprint.
        sync: how the reference moves, in words; None for one that does not.

    Examples:
        >>> identity = ReferenceIdentity("start", "snapshot", "tiny", None, "float32", "b2:00ff")
        >>> ReferenceIdentity(**identity.to_dict()) == identity
        True
    """

    meaning: Meaning
    method: Method
    source: str
    revision: str | None
    dtype: str
    fingerprint: str
    sync: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)
