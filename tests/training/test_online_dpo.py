"""Online DPO: the pairs are the best against the worst, the loss is DPO's, and the machinery is that of GRPO."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.nn.functional import logsigmoid

from tether import OnlineDPOConfig
from tether.errors import ConfigError
from tether.scoring import pack, score
from tether.training.online.groups import pairs_of
from training.online import SETTINGS, steps, trainer, weights


def sometimes(completion_ids, want):
    """No variance in the groups of every second prompt."""
    return [float(w * (sum(ids) % 5)) for ids, w in zip(completion_ids, want, strict=True)]


def made_pairs(made):
    source = made.run.source
    order = source._shape.order(len(source.rows), 0)[: source._shape.prompts]
    wanted = source._wanted(source.rows, source._raw, list(source._shape.shares(order)), 0, source._shape.group)
    sampled = made.run.algorithm.made.sample(wanted)
    rewards = sampled.table.values[:, 0]
    return sampled, rewards, pairs_of(wanted, sampled.groups, rewards, torch.ones(len(rewards), dtype=torch.bool))


def test_pairs_are_the_best_and_the_worst_of_each_group(tmp_path):
    made = trainer(tmp_path, "online_dpo", rewards=sometimes, num_generations=4, per_device_train_batch_size=16)
    sampled, rewards, (pairs,) = made_pairs(made)
    assert len(pairs) == 4
    for group, values, pair in zip(sampled.groups, rewards.view(4, 4), pairs, strict=True):
        if values.max() == values.min():
            assert pair.values["weight"] == 0.0
            assert [len(ids) for ids in pair.completion_ids] == [1, 1]
        else:
            assert pair.values["weight"] == 1.0
            best, worst = (group.completions[int(place)].ids for place in (values.argmax(), values.argmin()))
            assert [ids.tolist() for ids in pair.completion_ids] == [best.tolist(), worst.tolist()]
    assert {pair.values["weight"] for pair in pairs} == {0.0, 1.0}


def test_the_loss_is_dpo_s_over_all_prompts(tmp_path):
    """By the formula, with a policy that has left its reference; prompts without a pair count as zeros."""
    settings = {"num_generations": 4, "per_device_train_batch_size": 16, "max_tokens_per_forward": 60}
    made = trainer(tmp_path, "online_dpo", rewards=sometimes, beta=0.3, **settings)
    _, _, (pairs,) = made_pairs(made)
    batch = pack(pairs)
    with torch.no_grad():
        reference = score(made.policy, batch).logps
        made.policy.lm_head.weight.mul_(1.05)
    logps = score(made.policy, batch).logps
    apart = 0.3 * ((logps - reference)[0::2] - (logps - reference)[1::2])
    real = torch.tensor([pair.values["weight"] for pair in pairs])
    expected = (-logsigmoid(apart) * real).mean()
    expected.backward()
    wanted = made.policy.lm_head.weight.grad.clone()
    made.policy.zero_grad()
    with torch.no_grad():  # the rollout's own reference pass is of the policy as it began
        made.policy.lm_head.weight.div_(1.05)
    made.model.train()
    (examples,) = made.run.source._make(_wanted(made))
    with torch.no_grad():
        made.policy.lm_head.weight.mul_(1.05)
    loss = made.training_step(made.model, {"batch": pack(examples)})
    torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.policy.lm_head.weight.grad, wanted, atol=1e-5, rtol=1e-4)


def _wanted(made):
    source = made.run.source
    order = source._shape.order(len(source.rows), 0)[: source._shape.prompts]
    return source._wanted(source.rows, source._raw, list(source._shape.shares(order)), 0, source._shape.group)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "simpo"])
@pytest.mark.sweep(1)
def test_it_trains_resumes_and_replays(loss, tmp_path):
    settings = {"rewards": sometimes, "loss_type": loss, "num_generations": 4, "num_iterations": 2, "max_steps": 4}
    settings |= {"save_strategy": "steps", "save_steps": 1}
    made = trainer(tmp_path / "run", "online_dpo", **settings)
    made.train()
    logs = steps(made)
    if loss != "simpo":
        first = next(place for place, log in enumerate(logs) if "rewards/margins" in log)  # rewards may all be equal
        assert logs[first]["rewards/margins"] == 0.0
        assert logs[first + 1]["rewards/margins"] > 0.0, "the second update of the same pairs"
    assert made.run.reference.identity.meaning == ("none" if loss == "simpo" else "start")
    shutil.copytree(tmp_path / "run" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
    again = trainer(tmp_path / "again", "online_dpo", **settings)
    again.train(resume_from_checkpoint=True)
    replayed = trainer(tmp_path / "replayed", "online_dpo", **settings, replay_rollouts=str(tmp_path / "run"))
    replayed.train()
    for name, value in weights(made).items():
        assert torch.equal(value, weights(again)[name]), name
        assert torch.equal(value, weights(replayed)[name]), name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"loss_type": "tdpo1"}, "loss_type is tdpo1, which takes more than a pair"),
        ({"loss_type": "plackett_luce"}, "takes more than a pair"),
        ({"loss_type": "sigmoidal"}, "did you mean sigmoid"),
        ({"per_device_train_batch_size": 6, "num_generations": 4, "steps_per_generation": 2}, "a multiple of num_gen"),
        ({"vllm_importance_sampling_clip_max": 2.0}, "no loss of pairs has ratios"),
        ({"loss_type": "simpo", "reference": "start"}, "reference"),
    ],
)
def test_what_cannot_be_is_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        OnlineDPOConfig(output_dir="unused", **{**SETTINGS, **arguments})
