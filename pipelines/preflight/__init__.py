"""Checks before anything expensive: forty-five failures that were once silent, each made loud."""

from pipelines.preflight.battery import Battery, run_battery
from pipelines.preflight.finding import CannotRun, Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule

__all__ = ["Battery", "CannotRun", "Finding", "Inspection", "Rule", "run_battery"]
