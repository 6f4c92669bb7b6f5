"""What a run will cost, known before it begins: no weights are read."""

from tether.plan.estimate import Machine, Plan, plan_run

__all__ = ["Machine", "Plan", "plan_run"]
