"""Method `model`: a second model, with its own weights and dtype."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedTokenizerBase

from tether.compat.transformers import is_quantized
from tether.errors import ReferencePolicyError
from tether.models.fingerprint import model_fingerprint
from tether.models.partitioned import whole_weights
from tether.models.structure import transformers_model
from tether.reference.base import Reference, Scorer, on_device, scored
from tether.types import ReferenceIdentity, Scores, ScoringBatch


class ModelReference(Reference):
    """Another model; frozen here.

    Args:
        model: the weights.
        scorer: the scoring function in the model's layout.
        identity: what this reference is.
        reload: loads the same weights again, and places them; without it, released ones wait in the host's memory.
    """

    def __init__(
        self,
        model: nn.Module,
        scorer: Scorer,
        identity: ReferenceIdentity,
        reload: Callable[[], nn.Module] | None = None,
    ) -> None:
        self._model: nn.Module | None = model.requires_grad_(False)
        self._scorer, self.identity, self._reload = scorer, identity, reload
        self._device = next(model.parameters()).device
        self._placed: Callable[[nn.Module], nn.Module] | None = None

    def score(self, batch: ScoringBatch, outputs: tuple[str, ...] = ()) -> Scores:
        """See `Reference.score`. Moves the batch to the reference's device and the answer back."""
        scores = scored(self._scorer, self._recalled(), batch.to(self._device), outputs)
        return on_device(scores, batch.input_ids.device)

    @property
    def model(self) -> nn.Module:
        """The model, loaded again where it was let go."""
        return self._recalled()

    @property
    def resident(self) -> bool:
        """Whether the weights are in memory, on their device."""
        return self._model is not None and next(self._model.parameters()).device == self._device

    @property
    def may_release(self) -> bool:
        """Whether the weights can be loaded again, or wait in the host's memory."""
        return self._reload is not None or (self._model is not None and may_move(self._model))

    def release(self) -> None:
        """Let the weights go; the next `score` brings them back."""
        if self._reload is not None:
            self._model = None
        elif self._model is not None and self._placed is None and may_move(self._model):
            self._model.to("cpu")

    def place(self, put: Callable[[nn.Module], nn.Module]) -> None:
        """Hold the model as `put` gives it back, such as in shards, also when it is loaded again.

        A model that may not move stays where it is, and one that was placed already does, too.
        """
        if self._placed is None and (self._model is None or may_move(self._model)):
            self._placed = put
            self._model = None if self._model is None else put(self._model)

    def _recalled(self) -> nn.Module:
        if self._model is None and self._reload is not None:
            with whole_weights():
                model = self._reload().requires_grad_(False)
            found = model_fingerprint(model, without_adapters=False)
            if found != self.identity.fingerprint:
                raise ReferencePolicyError(
                    f"The reference {self.identity.source!r} was released and loaded again, and is another one now: "
                    f"its fingerprint is {found} and was {self.identity.fingerprint}. The files changed during the "
                    "run. Restore them, or name a revision, and start again."
                )
            self._model = model if self._placed is None else self._placed(model)
        model = self._model
        if model is None:
            raise ReferencePolicyError("The reference has no weights and no way to load them; this is a bug in Tether.")
        return model if self.resident else model.to(self._device)


def may_move(model: nn.Module) -> bool:
    """Whether a model's weights may go to another device: quantised ones, and those spread over several, stay."""
    inner = transformers_model(model)
    return getattr(inner, "hf_device_map", None) is None and not is_quantized(inner)


def refuse_wrong_model(policy: nn.Module, reference: nn.Module) -> None:
    """Refuse a model that cannot be this policy's reference.

    Raises:
        ReferencePolicyError: the policy itself or one that shares its trainable tensors, a model without a
            language-model head (sequence classification, say), or one with another vocabulary.
    """
    ours, theirs = transformers_model(policy), transformers_model(reference)
    trainable = {parameter.data_ptr() for parameter in policy.parameters() if parameter.requires_grad}
    shared = sum(parameter.data_ptr() in trainable for parameter in reference.parameters())
    if ours is theirs or shared:
        raise ReferencePolicyError(
            f"ref_model shares {shared or 'all its'} tensors with the policy, so it would move in training. "
            "Leave ref_model out (the reference is then the policy at the start), or pass a model of its own."
        )
    head = theirs.get_output_embeddings()
    if head is None:
        raise ReferencePolicyError(
            f"ref_model is a {type(theirs).__name__}, which has no language-model head; a reference gives each token a "
            "probability. Load it with AutoModelForCausalLM."
        )
    sizes = [model.config.get_text_config().vocab_size for model in (ours, theirs)]
    if sizes[0] != sizes[1]:
        raise ReferencePolicyError(
            f"ref_model has a vocabulary of {sizes[1]} tokens and the policy one of {sizes[0]}; log-probabilities of "
            "different vocabularies cannot be compared. Use a reference with the policy's tokenizer."
        )


def refuse_other_tokenizer(policy: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase) -> None:
    """Refuse a reference whose tokenizer reads the policy's token ids as other text.

    Ids that only one of the two knows do not matter here: a vocabulary of another size is refused by
    `refuse_wrong_model`.

    Raises:
        ReferencePolicyError: an id that both know stands for different tokens.
    """
    ours = {number: token for token, number in policy.get_vocab().items()}
    theirs = {number: token for token, number in reference.get_vocab().items()}
    odd = sorted(number for number in ours.keys() & theirs.keys() if ours[number] != theirs[number])
    if odd:
        shown = ", ".join(f"{number} is {ours[number]!r} here and {theirs[number]!r} there" for number in odd[:3])
        raise ReferencePolicyError(
            f"The reference has another tokenizer than the policy: {len(odd)} token ids stand for other tokens "
            f"({shown}). Log-probabilities of different texts cannot be compared. Use a reference that was trained "
            "with the policy's tokenizer."
        )
