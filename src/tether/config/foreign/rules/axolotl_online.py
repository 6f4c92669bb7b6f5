"""Axolotl's `rl: grpo` and `rl: gdpo`: the section `trl`, whose keys are TRL's, as rollouts and rewards."""

from __future__ import annotations

from typing import Any

from tether.config.fields import config_class, keys_of
from tether.config.foreign.draft import Draft, Source
from tether.config.foreign.rules import shared

KINDS = ("grpo", "gdpo")
_OWN = ("reward_funcs", "reward_weights", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")


def online(draft: Draft, source: Source) -> None:
    """The objective, the rollouts and the rewards."""
    given = source.mapping("trl")
    loss = given.get("loss_type") or "dapo"
    draft.set("objective.loss", loss, "rl")
    if source.get("rl") == "gdpo":
        draft.set("objective.multi_objective_aggregation", "normalize_then_sum", "rl")
    known = keys_of(config_class("dapo"))
    for name, value in given.items():
        if value is None or name in (*_OWN, "loss_type"):
            continue
        if name == "use_vllm":
            if value:
                draft.set("rollout.engine", "vllm", "trl")
        elif name == "multi_objective_aggregation" and source.get("rl") == "gdpo":
            if value != "normalize_then_sum":
                source.wrong(("trl", name), value, "normalize_then_sum, which is what gdpo is")
        elif name == "scale_rewards" and source.get("rl") == "gdpo":
            draft.explain("trl", "scale_rewards: each reward is scaled before they are summed, as gdpo does")
        elif name not in known:
            source.refuse(("trl", name), f"`trl.{name}` has no counterpart here. Take it out.")
        else:
            draft.set(known[name], value, "trl")
    shared.scale_of_rewards(draft)
    functions = given.get("reward_funcs")
    if not isinstance(functions, list) or not functions or not all(isinstance(one, str) for one in functions):
        source.wrong(("trl", "reward_funcs"), functions, "a list of functions, such as [rewards.brevity]")
    found: list[dict[str, Any]] = [shared.reward_function(source, ("trl", "reward_funcs"), name) for name in functions]
    draft.set("rewards", shared.weighted(source, found, given.get("reward_weights"), ("trl", "reward_weights")), "trl")
    draft.set("train.disable_dropout", False, comment="TRL's default")
    draft.values["train"].pop("max_length", None)
    draft.origins.pop(("train", "max_length"), None)
    draft.note(
        "sequence_len", "of completions that are there already; those that are sampled have max_completion_length"
    )
    if source.number("max_prompt_len"):
        draft.set("rollout.max_prompt", source.number("max_prompt_len"), "max_prompt_len")
