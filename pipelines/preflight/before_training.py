"""The battery as a training runs it: once, by the main process, and every process stops or goes on with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.preflight.battery import Battery
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.kept import kept_battery
from pipelines.preflight.rules import RULES
from pipelines.training.distributed import from_main_process, is_main_process
from transforms.errors import FiducialError


def before_training(
    inspection: Inspection,
    cache_dir: str | Path,
    acknowledge: Sequence[str] = (),
    thresholds: Sequence[str] = (),
) -> Battery:
    """Return what the rules for the time before a training have found, if that lets it start.

    Args:
        inspection: the run.
        cache_dir: findings on the data are kept in ``preflight/`` of it, by the digest of all they depend on.
        acknowledge, thresholds: of the user, see ``run_battery``.

    Raises:
        DataError, BundleError: an error that nobody has acknowledged.
        UsageError: see ``run_battery``.
    """
    result: Battery | FiducialError | None = None
    if is_main_process():
        try:
            rules = [rule for rule in RULES if rule.when == "preflight"]
            result = kept_battery(rules, inspection, cache_dir, acknowledge, thresholds)
            result.raise_if_stopping()
        except FiducialError as refusal:
            result = refusal
    result = from_main_process(result)
    if isinstance(result, FiducialError):
        raise result
    assert result is not None
    return result
