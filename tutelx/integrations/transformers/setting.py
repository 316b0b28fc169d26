"""What `tutelx.wrap` keeps on an experts module of transformers: how to run it, and what its last call saw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from tutelx.integrations.spec import ExpertsSpec
from tutelx.scheduler import default_planner
from tutelx.stats import RoutingStats
from tutelx.stopwatch import Stopwatch
from tutelx.types import Capacity, Decision, Planner

if TYPE_CHECKING:
    from tutelx.comm.ranks import Ranks

_ATTRIBUTE = "_tutelx"


class Setting:
    """Of one module; copies and pickles go without the last call.

    previous: the implementation that the library's configuration named before.
    last_decision, stats, watch: the last call's plan, its load, and its time if it was timed.
    ranks, spec: where the experts are shared with other ranks, and what they were found to compute before.
    """

    def __init__(self, *, previous: str | None, capacity: Capacity, planner: Planner | None) -> None:
        self.previous, self.capacity = previous, capacity
        self._planner = planner
        self.last_decision: Decision | None = None
        self.stats: RoutingStats | None = None
        self.watch: Stopwatch | None = None
        self.ranks: Ranks | None = None
        self.spec: ExpertsSpec | None = None

    @property
    def planner(self) -> Planner:
        if self._planner is None:  # not before it is needed: there is a setting as soon as the module is imported
            self._planner = default_planner()
        return self._planner

    @property
    def decision(self) -> Decision | None:
        return self.last_decision

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_decision": None, "stats": None, "watch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        from tutelx.integrations.transformers.registry import wrapped_name

        self.__dict__.update(state)
        wrapped_name(self.previous)  # a process that unpickles a model has to know the name in its configuration


DEFAULT = Setting(previous="eager", capacity=Capacity.dropless(), planner=None)


def setting_of(experts: nn.Module) -> Setting | None:
    """The setting of a wrapped experts module, `stats` and `last_decision` in it; None if it is not wrapped."""
    return experts.__dict__.get(_ATTRIBUTE)


def keep(experts: nn.Module, setting: Setting) -> None:
    experts.__dict__[_ATTRIBUTE] = setting


def forget(experts: nn.Module) -> None:
    experts.__dict__.pop(_ATTRIBUTE, None)
