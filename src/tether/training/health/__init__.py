"""What is said of a run that needs attention: the rules, and the callback that prints and keeps what they find."""

from tether.training.health.rules import Facts, Finding, Health
from tether.training.health.watch import HEALTH, Watch, facts_of

__all__ = ["HEALTH", "Facts", "Finding", "Health", "Watch", "facts_of"]
