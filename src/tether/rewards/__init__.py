"""What judges sampled completions: any callable, ready-made ones by name, reward models."""

from tether.rewards.call import Calling, call_rewards
from tether.rewards.model import ModelReward
from tether.rewards.protocol import Judged, Reward, RewardTable, as_rewards, check_signatures
from tether.rewards.ready import READY_MADE, python_function

__all__ = [
    "READY_MADE",
    "Calling",
    "Judged",
    "ModelReward",
    "Reward",
    "RewardTable",
    "as_rewards",
    "call_rewards",
    "check_signatures",
    "python_function",
]
