"""Method `remote`: log-probabilities from a server, so that no second model is in memory here."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b

import torch
from torch import Tensor, nn

from tether.errors import ReferencePolicyError
from tether.models.structure import transformers_model
from tether.reference.base import Reference, log_probs, require_log_probs_only
from tether.reference.guard import largest_difference
from tether.reference.methods.completions_server import CompletionsServer
from tether.reference.spec import RemoteOptions
from tether.scoring import tolerance
from tether.scoring.batch import sequence_sources, sequences
from tether.types import ReferenceIdentity, Scores, ScoringBatch

_PROBE = "remote_probe"


class RemoteReference(Reference):
    """A served model.

    The constructor asks for the probe: the whole of each sequence, its first part alone, and the last id of the
    policy's vocabulary, so that a server that reads other tokens, looks ahead or has fewer tokens is refused.

    Args:
        options: the server.
        identity: what it is said to be; with the fingerprint `served` it becomes a hash of the served name, and the
            probe's values travel in checkpoints in place of a hash of weights.
        policy: for its vocabulary and dtype.
        probe: a few real rows.

    Raises:
        ReferencePolicyError: the server cannot be this policy's reference.
    """

    def __init__(
        self, options: RemoteOptions, identity: ReferenceIdentity, policy: nn.Module, probe: ScoringBatch
    ) -> None:
        self._server = CompletionsServer(options)
        self.where = f"{self._server.model!r} at {self._server.url}"
        self.tolerance = options.tolerance or tolerance(policy)
        if identity.fingerprint == "served":
            card = self._server.card
            served = f"{card['id']}\n{card.get('root') or card['id']}"
            digest = blake2b(served.encode(), digest_size=20).hexdigest()
            identity = replace(identity, source=self.where, dtype="served", fingerprint=f"served:{digest}")
        self.identity = identity
        vocabulary = transformers_model(policy).config.get_text_config().vocab_size
        self._probe_values = self._consistent(probe, vocabulary)
        self._probe = probe

    def score(self, batch: ScoringBatch, outputs: tuple[str, ...] = ()) -> Scores:
        """See `Reference.score`. One request for each of the K sequences, several under way at once."""
        require_log_probs_only(outputs, "a server")
        rows = [row.tolist() for row in sequences(batch)]
        where = sequence_sources(batch)
        found = self._server.token_logps(rows)
        # The value of the token after place p is the p-th: the first token has none.
        parts = [torch.tensor(values)[places.cpu()] for values, places in zip(found, where, strict=True)]
        token_logps = torch.cat(parts).to(batch.input_ids.device)
        return Scores(token_logps, batch.completion_index, batch.num_completions)

    def require_parity(self, here: Reference) -> float:
        """Compare with the same reference computed in this process.

        Returns:
            Largest difference of a token's log-probability, in nats.

        Raises:
            ReferencePolicyError: it is more than the tolerance.
        """
        difference = largest_difference(self._probe_values, log_probs(here, self._probe))
        if difference > self.tolerance:
            raise ReferencePolicyError(
                f"The server's model {self.where} is not the reference {here.identity.meaning!r}: on "
                f"{self._probe.num_examples} rows a token's log-probability differs by {difference:.3g} nats from the "
                f"same computed here (allowed {self.tolerance:.0e}). Serve the weights that this run starts from, in "
                "the same dtype, or set `tolerance` of the remote reference to what its dtype explains."
            )
        return difference

    def state(self) -> dict[str, Tensor]:
        """What the server said of the probe, so that a resumed run knows it again."""
        return {_PROBE: self._probe_values, f"{_PROBE}_ids": self._probe.input_ids}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Compare with what the server said when the checkpoint was written.

        Raises:
            ReferencePolicyError: it says something else now.
        """
        before, ids = tensors.get(_PROBE), tensors.get(f"{_PROBE}_ids")
        if before is None or ids is None or not torch.equal(ids, self._probe.input_ids.cpu()):
            return  # other rows: the identity alone decides
        difference = largest_difference(before, self._probe_values.cpu())
        if difference > self.tolerance:
            raise ReferencePolicyError(
                f"The server's model {self.where} has changed since the checkpoint was written: on the same rows a "
                f"token's log-probability differs by {difference:.3g} nats (allowed {self.tolerance:.0e}). Serve the "
                "model that the run was started with."
            )

    def _consistent(self, probe: ScoringBatch, vocabulary: int) -> Tensor:
        values = self.score(probe).token_logps
        row = max(sequences(probe), key=len).tolist()
        half = max(2, len(row) // 2)
        whole, part, _ = self._server.token_logps([row, row[:half], [row[0], vocabulary - 1]])
        ahead = max(abs(a - b) for a, b in zip(whole, part, strict=False))
        if ahead > self.tolerance:
            raise ReferencePolicyError(
                f"The server's model {self.where} gives the first {half} tokens of a row other log-probabilities when "
                f"more tokens follow ({ahead:.3g} nats, allowed {self.tolerance:.0e}). It is no causal model, or its "
                "values belong to other places."
            )
        return values
