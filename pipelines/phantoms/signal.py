"""From tissue fractions to images: tables of tissue properties, signal equations, bias field and noise.

An image is the sum over tissues of fraction times signal, as in BrainWeb (Kwan, Evans & Pike, IEEE TMI 18, 1999): one
signal per tissue, and partial volume mixes signals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MODALITIES = ("t1", "t2", "flair", "ct")


@dataclass(frozen=True)
class Tissue:
    """T1 and T2 in ms at 1.5 T, proton density relative to water, and attenuation in Hounsfield units of a tissue."""

    t1_ms: float
    t2_ms: float
    proton_density: float
    hu: float


TISSUES: Mapping[str, Tissue] = {
    "air": Tissue(1.0, 1.0, 0.0, -1000.0),
    "csf": Tissue(2569.0, 329.0, 1.0, 8.0),
    "grey": Tissue(833.0, 83.0, 0.86, 37.0),
    "white": Tissue(500.0, 70.0, 0.77, 29.0),
    "lesion": Tissue(752.0, 150.0, 0.76, 22.0),
    "cortical_bone": Tissue(300.0, 1.0, 0.05, 1100.0),
    "diploe": Tissue(450.0, 60.0, 0.50, 500.0),
    "muscle": Tissue(900.0, 47.0, 1.0, 55.0),
    "skin": Tissue(900.0, 47.0, 1.0, 40.0),
    "fat": Tissue(350.0, 70.0, 1.0, -90.0),
}
"""T1, T2 and proton density of CSF, grey, white, muscle, skin and fat: BrainWeb's table at 1.5 T (Collins et al., IEEE
TMI 17, 1998; Kwan et al., 1999). Lesion: BrainWeb's MS lesion, but with T2 about half-way between white matter (70) and
its 237 ms, so that lesions are not all as bright as a chronic core. Cortical bone has next to no signal, diploe that of
marrow, half of it fat. Hounsfield units: within the usual clinical ranges (CSF 0-15, white 20-30, grey 35-45, oedema
some units below white, fat -60 to -120, cortical bone about 1000 and above, diploe 300-700)."""

SPGR_TR_MS, SPGR_FLIP_DEG = 18.0, 30.0
T2_TR_MS, T2_TE_MS = 4000.0, 100.0
FLAIR_TR_MS, FLAIR_TE_MS = 9000.0, 120.0


def spoiled_gradient_echo(tissue: Tissue, tr_ms: float, flip_deg: float) -> float:
    """Spoiled gradient echo at an echo time short against T2* (Ernst & Anderson, Rev Sci Instrum 37, 1966).

    S = PD sin(a) (1 - E) / (1 - cos(a) E) with E = exp(-TR / T1).
    """
    recovery, flip = np.exp(-tr_ms / tissue.t1_ms), np.deg2rad(flip_deg)
    return float(tissue.proton_density * np.sin(flip) * (1 - recovery) / (1 - np.cos(flip) * recovery))


def spin_echo(tissue: Tissue, tr_ms: float, te_ms: float) -> float:
    """Spin echo: S = PD (1 - exp(-TR / T1)) exp(-TE / T2)."""
    saturation, decay = 1 - np.exp(-tr_ms / tissue.t1_ms), np.exp(-te_ms / tissue.t2_ms)
    return float(tissue.proton_density * saturation * decay)


def inversion_recovery(tissue: Tissue, tr_ms: float, te_ms: float, ti_ms: float) -> float:
    """Inversion recovery spin echo, signed: S = PD (1 - 2 exp(-TI / T1) + exp(-TR / T1)) exp(-TE / T2)."""
    recovery = 1 - 2 * np.exp(-ti_ms / tissue.t1_ms) + np.exp(-tr_ms / tissue.t1_ms)
    return float(tissue.proton_density * recovery * np.exp(-te_ms / tissue.t2_ms))


def nulling_inversion_time(t1_ms: float, tr_ms: float) -> float:
    """Inversion time in ms at which a tissue of ``t1_ms`` gives no signal: TI = T1 ln(2 / (1 + exp(-TR / T1)))."""
    return float(t1_ms * np.log(2 / (1 + np.exp(-tr_ms / t1_ms))))


def tissue_signal(modality: str, tissue: Tissue) -> float:
    """Signal of a pure tissue: Hounsfield units for ``ct``, else a fraction of water's equilibrium magnetisation."""
    if modality == "ct":
        return tissue.hu
    if modality == "t1":
        return spoiled_gradient_echo(tissue, SPGR_TR_MS, SPGR_FLIP_DEG)
    if modality == "t2":
        return spin_echo(tissue, T2_TR_MS, T2_TE_MS)
    # The scanner nulls the CSF of the table: a subject's own CSF, a little off it, leaves the trace seen in real FLAIR.
    ti_ms = nulling_inversion_time(TISSUES["csf"].t1_ms, FLAIR_TR_MS)
    return inversion_recovery(tissue, FLAIR_TR_MS, FLAIR_TE_MS, ti_ms)


TISSUE_SD = 0.015


def varied_tissues(rng: np.random.Generator, relative_sd: float = TISSUE_SD) -> dict[str, Tissue]:
    """Tissues of one subject: every property of the table times 1 + N(0, ``relative_sd``); air stays air."""
    varied = {}
    for name, tissue in TISSUES.items():
        t1, t2, density, hu = 1 + relative_sd * rng.standard_normal(4)
        properties = Tissue(tissue.t1_ms * t1, tissue.t2_ms * t2, tissue.proton_density * density, tissue.hu * hu)
        varied[name] = tissue if name == "air" else properties
    return varied


def tissue_image(fractions: Mapping[str, NDArray[np.float32]], signals: Mapping[str, float]) -> NDArray[np.float64]:
    """Sum over tissues of fraction (X, Y, Z) times signal, in the unit of the signals; no noise, no bias."""
    image = np.zeros(next(iter(fractions.values())).shape)
    for tissue, fraction in fractions.items():
        image += signals[tissue] * fraction
    return image


def bias_field(mask: NDArray[np.bool_], rng: np.random.Generator, amplitude: float = 0.2) -> NDArray[np.float64]:
    """Smooth positive receive field (X, Y, Z) whose mean in ``mask`` is 1.

    Its largest over its smallest value in ``mask`` is (1 + ``amplitude``)^2. Its logarithm is a random sum of the
    cosines of at most one period per field of view, up to total order 2.
    """
    waves = [np.cos(np.pi * np.outer(np.arange(3), np.arange(n) + 0.5) / n) for n in mask.shape]
    order = np.indices((3, 3, 3)).sum(0)
    weights = rng.standard_normal((3, 3, 3)) * np.where((order > 0) & (order <= 2), 2.0**-order, 0)
    exponent = np.einsum("abc,ax,by,cz->xyz", weights, *waves, optimize=True)
    exponent -= (exponent[mask].max() + exponent[mask].min()) / 2
    field = np.exp(exponent * np.log1p(amplitude) / np.abs(exponent[mask]).max())
    return field / field[mask].mean()


def rician_noise(image: NDArray[np.float64], sigma: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Magnitude of ``image`` with Gaussian noise of ``sigma`` in both channels (Gudbjartsson & Patz, MRM 34, 1995)."""
    real = image + sigma * rng.standard_normal(image.shape)
    return np.hypot(real, sigma * rng.standard_normal(image.shape))
