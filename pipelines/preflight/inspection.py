"""What the rules look at: a bundle's run before it starts, piece by piece, each made only when a rule asks for it.

A configuration names the pieces (``inspection:``); a piece that it does not have makes a rule say "not run".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch

from pipelines.manifests import Manifest
from pipelines.preflight.finding import CannotRun

TASKS = ("segmentation", "fusion", "organelles", "spectral", "instances")
MOST_CASES = 16  # of a split that a rule of intensities looks at


@dataclass(frozen=True)
class Inspection:
    """The pieces of a run. None (or nothing) = the bundle does not have it.

    Attributes:
        task: one of ``TASKS``.
        bundle: name of the bundle.
        config: the configuration, macros and overrides resolved, references not.
        cohort: the manifest.
        contract: what will stand in the weights.
        train, validation: data sets with ``data`` (items: paths), ``cases`` (prepared, by memory map), ``transform``.
        network: with its first weights, on its device. A rule that runs it runs a copy.
        loss: name of a loss -> the loss.
        plan: phases of the training.
        inferer: of validation: windows over a volume.
        metrics: of validation, by name.
        precision: of the arithmetic: fp32, bf16, fp16.
        device: of the training.
        extra: pieces of one task alone, by name (for instance ``lesion_head``).
    """

    task: str
    bundle: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    cohort: Manifest | None = None
    contract: Mapping[str, Any] = field(default_factory=dict)
    train: Any = None
    validation: Any = None
    network: torch.nn.Module | None = None
    loss: Callable[[str], torch.nn.Module] | None = None
    plan: Sequence[Any] = ()
    inferer: Any = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    device: torch.device | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def need(self, name: str) -> Any:
        """Return a piece, or an entry of ``extra``.

        Raises:
            CannotRun: the bundle does not have it.
        """
        known = {each.name for each in fields(self)}
        value = getattr(self, name) if name in known else self.extra.get(name)
        if value is None or (isinstance(value, (Mapping, Sequence)) and not len(value)):
            raise CannotRun(f"the bundle names no {name}")
        return value

    @cached_property
    def training_cases(self) -> list[dict[str, Any]]:
        """At most ``MOST_CASES`` training cases as the deterministic chain leaves them (arrays by memory map)."""
        return spread(self.need("train").cases)

    @cached_property
    def validation_cases(self) -> list[dict[str, Any]]:
        """The same of validation."""
        return spread(self.need("validation").cases)


def spread(cases: Sequence[Any], most: int = MOST_CASES) -> list[dict[str, Any]]:
    """Return at most ``most`` of the cases, evenly spaced through the list, each as a dictionary of arrays and values.

    Arrays are (C, *spatial), without a copy; the affine of an image stands at ``<key>_affine`` (4, 4).
    """
    step = max(1, -(-len(cases) // most))
    return [as_dictionary(case) for case in list(cases)[::step]]


def as_dictionary(case: Any) -> dict[str, Any]:
    """Return a case of the content cache as a dictionary; a dictionary as it is."""
    if isinstance(case, Mapping):
        return dict(case)
    arrays = {key: case.array(key) for key in case.arrays}
    affines = {f"{key}_affine": case.affine(key) for key in case.arrays if case.affine(key) is not None}
    return {**case.values, **arrays, **affines}
