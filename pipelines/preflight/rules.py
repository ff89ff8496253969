"""The rules that are asked before a training: first what costs nothing, last what runs the network."""

from __future__ import annotations

from pipelines.preflight import (
    arithmetic,
    augmentation,
    checkpoint,
    condition,
    configuration,
    data,
    environment,
    geometry,
    intensity,
    labels,
    loss,
    memory,
    metrics,
    network,
    sampler,
    spectral,
    splits,
    steps,
)
from pipelines.preflight.rule import Rule

RULES: tuple[Rule, ...] = (
    *environment.RULES,
    *configuration.RULES,
    *data.RULES,
    *geometry.RULES,
    *splits.RULES,
    *labels.RULES,
    *intensity.RULES,
    *spectral.RULES,
    *augmentation.RULES,
    *memory.RULES,
    *checkpoint.RULES,
    *network.RULES,
    *steps.RULES,
    *condition.RULES,
    *arithmetic.RULES,
    *loss.RULES,
    *sampler.RULES,
    *metrics.RULES,
)
