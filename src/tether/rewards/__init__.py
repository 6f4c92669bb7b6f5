"""What judges sampled completions: any callable, ready-made ones by name, reward models."""

from tether.rewards.builtin import READY_MADE, python_function
from tether.rewards.call import Calling, call_rewards
from tether.rewards.judge import EndpointJudge, FunctionJudge, PairJudge, Verdict, judge_reward, win_rate
from tether.rewards.model import ModelReward
from tether.rewards.protocol import OFFERED, Judged, Reward, RewardTable, as_rewards, check_signatures

__all__ = [
    "OFFERED",
    "READY_MADE",
    "Calling",
    "EndpointJudge",
    "FunctionJudge",
    "Judged",
    "ModelReward",
    "PairJudge",
    "Reward",
    "RewardTable",
    "Verdict",
    "as_rewards",
    "call_rewards",
    "check_signatures",
    "judge_reward",
    "python_function",
    "win_rate",
]
