"""The rules that are asked before a training: first what costs nothing, last what runs the network."""

from __future__ import annotations

from pipelines.preflight import (
    augmentation,
    checkpoint,
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
    *loss.RULES,
    *sampler.RULES,
    *metrics.RULES,
)
