"""What the reference was, how it was computed, and what the guard found."""

from __future__ import annotations

from typing import Any

from tether.report.cards import title_of
from tether.report.numbers import number
from tether.report.read import Run

_MEANINGS = {
    "start": "the policy as it was before the first update",
    "base": "the model's weights without any adapter",
    "model": "another model that was named",
    "adapter": "an adapter that was named",
    "none": "nothing: this objective needs no reference",
}
_METHODS = {
    "adapter_off": "the policy itself with its adapter switched off, which was checked to equal the start",
    "adapter_on": "the policy itself with the named adapter switched on",
    "snapshot": "the policy itself with its trainable tensors swapped for a copy kept from the start",
    "model": "a second model",
    "store": "log-probabilities read from disk",
    "remote": "a server",
}


def reference_section(run: Run) -> dict[str, Any] | None:
    """The reference in sentences, and its identity.

    Args:
        run: what was read.

    Returns:
        The section; None without `reference.json`.
    """
    identity, guard = run.reference.get("identity"), run.reference.get("guard")
    if not isinstance(identity, dict):
        return None
    meaning, method = identity.get("meaning"), identity.get("method")
    words = [f"The reference is {_MEANINGS.get(str(meaning), str(meaning))}."]
    if meaning != "none":
        words.append(f"Its log-probabilities come from {_METHODS.get(str(method), str(method))}.")
    if isinstance(guard, dict):
        passed = guard.get("passed")
        words.append(
            f"Before the first update, policy and reference scored the same {number(guard.get('rows'))} rows; the "
            f"log-probability of a token differed by at most {number(guard.get('max_difference'))} nats, where "
            f"{number(guard.get('tolerance'))} is allowed: the guard {'passed' if passed else 'did not pass'}."
        )
    elif meaning == "start":
        words.append("No comparison of the two before the first update is on record, as after resuming a run.")
    elif meaning != "none":
        words.append("The policy does not start at this reference, so the two were not compared.")
    rows = [(title_of(key), str(value)) for key, value in identity.items() if value not in (None, "")]
    line = run.reference.get("line")
    return {"words": " ".join(words), "identity": rows, "line": str(line) if line else ""}
