"""Where a scheduler's knowledge comes from, and where what it learns goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tutelx.errors import InvalidTypeError
from tutelx.scheduler.answers import Knowledge, ruled
from tutelx.tuning.records import Candidate, StoredPlan
from tutelx.tuning.space import legal_plans
from tutelx.types import Plan, Workload

Places = Any  # None, a folder, several, or something that has find()


def possible_plans(workload: Workload) -> Sequence[Plan]:
    """What may be tried in its place, the plan of the rules first."""
    return legal_plans(workload, default=ruled(workload))


class Source:
    """The measurements of this process. Nothing is read before it is asked for."""

    def __init__(self, places: Places) -> None:
        folders = [places] if isinstance(places, (str, Path)) else places
        if not (
            places is None
            or hasattr(places, "find")
            or (isinstance(folders, (list, tuple)) and all(isinstance(f, (str, Path)) for f in folders))
        ):
            raise InvalidTypeError(f"db is {type(places).__name__}, expected None, folders or something with find()")
        self.places = places

    def knowledge(self, device: str) -> Knowledge:
        return Knowledge(self.places if hasattr(self.places, "find") else None, plans=possible_plans)

    def snapshot(self, device: str) -> bytes:
        """All that other ranks need to answer alike."""
        return b""

    def restored(self, data: bytes) -> Knowledge:
        return Knowledge(plans=possible_plans)

    def keep(self, workload: Workload, candidates: Sequence[Candidate], default: StoredPlan) -> None:
        """Writes what was explored to the user's database."""
