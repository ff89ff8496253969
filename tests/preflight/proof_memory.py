"""Planted failures of memory: cases held in every process, a network that is there twice."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
from planted import Proof
from proof_network import found, fusion, lesion

from pipelines.preflight.memory import RULES
from pipelines.training import averaged_network

CASES, NETWORKS = "cases in memory", "one network"
TERABYTE = 10**12


class InMemory:
    """A data set that holds its cases: seven of 206 GB, of which nothing is really there."""

    def __init__(self) -> None:
        voxels = np.broadcast_to(np.zeros(1, np.uint8), (206 * 10**9,))
        self._cache = [{"image": voxels.view()} for _ in range(7)]


def keeping(**pieces: Any) -> Any:
    return replace(lesion(), extra=pieces)


PROOFS = [
    Proof(
        rule="R16",
        check="bytes held, times processes, times workers, fit into memory",
        origin="caches multiplied by processes: 7 x 206 GB",
        planted=lambda: found(RULES, "R16", replace(lesion(), train=InMemory()), CASES),
        healthy=lambda: found(RULES, "R16", lesion(), CASES) + found(RULES, "R16", fusion(), CASES),
    ),
    Proof(
        rule="R16",
        check="the network is there once, and its average",
        origin="a second copy of the model alive on the device",
        planted=lambda: found(RULES, "R16", keeping(teacher=copy.deepcopy(lesion().network)), NETWORKS),
        healthy=lambda: found(RULES, "R16", keeping(average=averaged_network(lesion().network, 0.9)), NETWORKS),
    ),
]
