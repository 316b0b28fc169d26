"""The scheduler of every call: what was measured, looked up in microseconds; what was not, tried in real steps."""

from tutelx.scheduler.explore import Exploring
from tutelx.scheduler.scheduler import Scheduler, default_planner

__all__ = ["Exploring", "Scheduler", "default_planner"]
