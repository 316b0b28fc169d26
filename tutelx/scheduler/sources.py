"""Where a scheduler's knowledge comes from, and where what it learns goes."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tutelx.errors import DatabaseError, InvalidTypeError
from tutelx.scheduler.answers import Knowledge, ruled
from tutelx.scheduler.models import FittedModel, fitted, sheet_from_json, sheet_to_json
from tutelx.tuning.cost import RateModel
from tutelx.tuning.hardware import Hardware
from tutelx.tuning.here import here, software
from tutelx.tuning.key import Key
from tutelx.tuning.links import Links
from tutelx.tuning.lookup import Lookup
from tutelx.tuning.records import Candidate, Record, StoredPlan
from tutelx.tuning.space import legal_plans
from tutelx.tuning.store import Database
from tutelx.types import Plan, Workload

_log = logging.getLogger("tutelx")

_OP = "layer"


def possible_plans(workload: Workload) -> Sequence[Plan]:
    """What may be tried in its place, the plan of the rules first."""
    return legal_plans(workload, default=ruled(workload))


class Source:
    """The measurements of this process. Nothing is read before it is asked for.

    places: None: what was shipped, the site's and the user's; a folder or several; a Lookup; or what has `find`.
    hardware: the machine; None: it is looked at when the first measurement is read or written.

    Raises:
        InvalidTypeError: it is none of these.
    """

    def __init__(self, places: Any, hardware: Hardware | None = None) -> None:
        folders = [places] if isinstance(places, (str, Path)) else places
        self._finds = hasattr(places, "find") and not isinstance(places, str)
        if not (places is None or self._finds):
            if not (isinstance(folders, (list, tuple)) and all(isinstance(f, (str, Path)) for f in folders)):
                raise InvalidTypeError(f"db is {type(places).__name__}, expected None, folders or what has find()")
            folders = [Path(folder) for folder in folders]
        self.places, self.hardware, self._folders = places, hardware, folders
        self._database: Database | None = None

    def knowledge(self, device: str) -> Knowledge:
        """Of a kind of device. A database that cannot be used is reported, and as good as none."""
        if self._finds and not isinstance(self.places, Lookup):
            return Knowledge(self.places, plans=possible_plans)
        try:
            lookup = self._lookup(device)
            model = None if lookup is None else fitted(lookup.hardware, (s.record for s in lookup.database.records()))
        except Exception:
            _log.exception("the tuning database cannot be used: plans are those of the rules")
            return Knowledge(plans=possible_plans)
        if lookup is not None and lookup.cost_model is None:
            lookup.cost_model = model
        return Knowledge(lookup, model, plans=possible_plans)

    def snapshot(self, device: str, world: int) -> bytes:
        """All that other ranks need to answer alike.

        Raises:
            InvalidTypeError: what was given for a database has only `find`.
        """
        if self._finds and not isinstance(self.places, Lookup):
            raise InvalidTypeError(f"{type(self.places).__name__} cannot be handed to other ranks, expected a Lookup")
        known = self.knowledge(device)
        lookup, model = known.lookup, known.model
        if not isinstance(lookup, Lookup):
            return b""
        records = [s for s in lookup.database.records() if s.record.op == _OP and s.record.key.device == device]
        part = Lookup(Database.of_stored(records), lookup.hardware, software=lookup.software)
        value = {
            "lookup": part.to_json(),
            "sheet": sheet_to_json(model.sheet) if isinstance(model, FittedModel) else None,
            "links": not self._given and any(s.record.key.world == world for s in records),
        }
        return zlib.compress(json.dumps(value).encode("utf-8"), 1)

    def restored(self, data: bytes) -> tuple[Knowledge, bool]:
        """What rank 0 knows, and whether it was measured over links that have to be compared with these ranks'."""
        if not data:
            return Knowledge(plans=possible_plans), False
        value = json.loads(zlib.decompress(data))
        model = None if value["sheet"] is None else RateModel(sheet_from_json(value["sheet"]))
        return Knowledge(Lookup.from_json(value["lookup"], model), model, plans=possible_plans), value["links"]

    def keep(
        self, workload: Workload, candidates: Sequence[Candidate], default: StoredPlan, links: Links | None = None
    ) -> None:
        """Writes what was explored to the user's database; where that fails, this process knows it all the same.

        links: of the ranks that explored.
        """
        try:
            hardware = self._machine(workload.device)
            record = Record(
                hardware=hardware if links is None else links.of(hardware),
                key=Key.of(workload),
                default=default,
                candidates=tuple(candidates),
                software=software(workload.device),
                provenance={
                    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    "command": "online: tried in the steps of a run",
                    "source": "online",
                },
            )
            database = self._open()
            database.add(record, database.layers[-2 if len(database.layers) > 1 else -1].name)
        except DatabaseError as error:
            _log.warning("what was explored is not written: %s", error)
        except Exception:
            _log.exception("what was explored is not written")

    @property
    def _given(self) -> bool:
        """The caller has said what the machine is."""
        return self.hardware is not None or isinstance(self.places, Lookup)

    def _lookup(self, device: str) -> Lookup | None:
        if isinstance(self.places, Lookup):
            return self.places
        database = self._open()
        if not any(s.record.op == _OP and s.record.key.device == device for s in database.records()):
            return None
        return Lookup(database, self._machine(device), software=software(device))

    def _machine(self, device: str) -> Hardware:
        if isinstance(self.places, Lookup):
            return self.places.hardware
        return here(device) if self.hardware is None else self.hardware

    def _open(self) -> Database:
        if isinstance(self.places, Lookup):
            return self.places.database
        if self._database is None:
            self._database = Database.open() if self._folders is None else Database.of_folders(*self._folders)
        return self._database
