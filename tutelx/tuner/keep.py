"""Where a search keeps its records: a layer of the tuning database."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tutelx.errors import InvalidValueError
from tutelx.tuner.machine import Machine
from tutelx.tuning.cost import CostModel, RateModel, calibrate, sheet_of
from tutelx.tuning.key import Key
from tutelx.tuning.records import Record
from tutelx.tuning.store import Database
from tutelx.tuning.union import staleness


class DatabaseStore:
    """folder: of the database; None: the user's layer, above what was shipped and the site's.

    Raises:
        InvalidValueError: there is no folder for the user's layer.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is None:
            self.database, self._layer = Database.open(), "user"
        else:
            self.database, self._layer = Database.of_folders(folder), str(folder)
        root = next((layer.root for layer in self.database.layers if layer.name == self._layer), None)
        if root is None:
            raise InvalidValueError("the user has no cache folder on this machine: give one with --db FOLDER")
        self.where = str(root)

    def settled(self, machine: Machine) -> Machine:
        """With the fingerprint under which this kind of machine is filed already: rates differ from look to look."""
        for stored in self.database.records():
            if stored.record.hardware.same_as(machine.hardware):
                return replace(machine, hardware=stored.record.hardware)
        return machine

    def known(self, key: Key, machine: Machine) -> Record | None:
        """Of the same kind of hardware and the same versions; the one with most candidates."""
        found = [
            stored.record
            for stored in self.database.records()
            if stored.record.key == key
            and stored.record.hardware.same_as(machine.hardware)
            and not staleness(stored.record, machine.software)
        ]
        return max(found, key=lambda record: len(record.candidates), default=None)

    def add(self, record: Record) -> None:
        """Written when this returns.

        Raises:
            DatabaseError: it could not be.
        """
        self.database.add(record, self._layer)

    def cost_model(self, machine: Machine) -> CostModel:
        """Of this machine, fitted to what was measured on it."""
        links = bool(machine.hardware.intra_link or machine.hardware.inter_link)
        records = [
            stored.record
            for stored in self.database.records()
            if stored.record.hardware.same_as(machine.hardware, links=links)
        ]
        return RateModel(calibrate(records, sheet_of(machine.hardware)).sheet)
