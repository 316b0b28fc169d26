"""What a plan should take, from the rates of a machine: an alpha-beta model, its sheets, its calibration."""

from tutelx.tuning.cost.base import Cost, CostModel
from tutelx.tuning.cost.calibrate import Fit, calibrate, workload_of
from tutelx.tuning.cost.model import RateModel, from_hardware
from tutelx.tuning.cost.sheets import SHEETS, Link, Sheet, sheet, sheet_of

__all__ = [
    "SHEETS",
    "Cost",
    "CostModel",
    "Fit",
    "Link",
    "RateModel",
    "Sheet",
    "calibrate",
    "from_hardware",
    "sheet",
    "sheet_of",
    "workload_of",
]
