"""The cost model of a machine, with rates fitted to what was measured on it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

from tutelx.tuning.cost import Cost, Link, RateModel, Sheet, calibrate, sheet_of
from tutelx.tuning.hardware import Hardware
from tutelx.tuning.records import Record
from tutelx.types import Plan, Workload

LEAST_RECORDS = 4  # of this machine, for its rates to be fitted

_log = logging.getLogger("tutelx")


class FittedModel:
    """A cost model whose sheet is fitted, for about a second, when the first prediction is asked for."""

    def __init__(self, hardware: Hardware, records: Sequence[Record]) -> None:
        self._hardware, self._records = hardware, records

    @cached_property
    def sheet(self) -> Sheet:
        fit = calibrate(self._records, sheet_of(self._hardware))
        _log.info("cost model: %s", fit)
        return fit.sheet

    @cached_property
    def _model(self) -> RateModel:
        return RateModel(self.sheet)

    def predict(self, workload: Workload, plan: Plan) -> Cost:
        return self._model.predict(workload, plan)


def fitted(hardware: Hardware, records: Iterable[Record]) -> FittedModel | None:
    """None where too little was measured on this very machine."""
    own = [r for r in records if r.op == "layer" and r.hardware.same_as(hardware, links=r.key.world > 1)]
    return FittedModel(hardware, own) if len(own) >= LEAST_RECORDS else None


def sheet_to_json(sheet: Sheet) -> dict[str, Any]:
    return asdict(sheet)


def sheet_from_json(value: dict[str, Any]) -> Sheet:
    return Sheet(**{**value, "intra": Link(**value["intra"]), "inter": Link(**value["inter"])})
