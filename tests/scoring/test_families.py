"""Every family of causal models that transformers has and that can be made small: scored as alone, or refused well."""

from __future__ import annotations

import pytest
import torch

from causal_families import VOCABULARY, families, tiny_config, tiny_family
from tether.errors import ScoringError
from tether.models.before.limits import Limits
from tether.scoring import choose_layout, pack, score, score_alone
from tiny import ragged_examples

# One of each way to be scored: trees, latents that are expanded, padded rows, positions of its own, and refused.
SOME = {
    "BertConfig": "tree",
    "CTRLConfig": "tree",
    "DeepseekV3Config": "tree",
    "GPTJConfig": "padded",
    "Llama4TextConfig": "padded",
    "RobertaConfig": "padded",
    "XLNetConfig": "refused",
    "XmodConfig": "refused",
}
# Refused, with a part of the reason; whatever else is refused is found by the sweep.
REFUSED = {
    "CpmAntConfig": "is not causal",
    "XLMConfig": "is not causal",
    "XLNetConfig": "is not causal",
    "ProphetNetConfig": "IndexError",
    "MiniCPM3Config": "padded layout refused",
    "RecurrentGemmaConfig": "carries state along the row",
    "XmodConfig": "Input language unknown",
    "Zamba2Config": "cannot be called on one sequence",
    "xLSTMConfig": "padded layout refused",
}
# How many can be built here, at least: a sweep over nothing would pass.
_BUILT = 130


def outcome(name: str) -> str:
    """`tree`, `padded`, `refused` or `not built`; asserts that what is scored is right, and long rows are told."""
    try:
        model = tiny_family(name)
    except Exception:  # a tiny configuration that this family does not take: nothing of Tether has run
        return "not built"
    if model is None:
        return "not built"
    examples = ragged_examples()
    batch = pack(examples)
    if name in REFUSED:
        with pytest.raises(ScoringError, match=REFUSED[name]):
            choose_layout(model.eval(), examples)
        return "refused"
    choice = choose_layout(model.eval(), examples)
    with torch.no_grad():
        alone = score_alone(model, batch)
        found = score(model, batch, **choice.options).token_logps
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
    model.train()
    score(model, batch, **choice.options).token_logps.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    require_limit_told(name, model.eval())
    return choice.layout


def require_limit_told(name: str, model: torch.nn.Module) -> None:
    """A row that is too long for the model is refused by the configuration alone, and one that is not is not."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit > 512:
        return
    said = Limits(tiny_config(name), None, VOCABULARY).problem(limit + 1, 5)
    row = torch.randint(3, VOCABULARY, (1, limit + 1), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)
    except (IndexError, RuntimeError, AttributeError, ValueError):
        assert f"Set max_length to {limit} or less" in said, name
    else:
        assert not said, name


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", SOME)
def test_a_family_is_scored_as_alone_or_refused_well(name):
    """INV-16: within 1e-5 of a plain forward."""
    assert outcome(name) == SOME[name]


@pytest.mark.slow
def test_all_families_are_scored_as_alone_or_refused_well(capsys):
    """INV-16: 0 raw tracebacks, and not one wrong number."""
    found, wrong = {}, {}
    for name in families():
        try:
            found[name] = outcome(name)
        except Exception as error:  # all of them are shown, not the first
            wrong[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    counts = {way: list(found.values()).count(way) for way in ("tree", "padded", "refused", "not built")}
    with capsys.disabled():
        print(f"\n{len(found) + len(wrong)} families: {counts}")
    assert wrong == {}
    assert len(found) - counts["not built"] >= _BUILT
    assert {name for name, way in found.items() if way == "refused"} == set(REFUSED)


def test_a_model_that_reads_the_whole_row_is_refused():
    """A BERT that is not told to be a decoder predicts a token from itself, and padded rows agree with rows alone."""
    model = tiny_family("BertConfig", decoder=False)
    examples = ragged_examples()
    with torch.no_grad():
        alone = score_alone(model.eval(), pack(examples))
        torch.testing.assert_close(score(model, pack(examples), layout="padded").token_logps, alone, atol=1e-5, rtol=0)
    with pytest.raises(ScoringError, match=r"is not causal.*is_decoder"):
        choose_layout(model, examples)
