"""Slices of a case with truth and prediction drawn on them: for TensorBoard and for the page of a bundle."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy import ndimage

from pipelines.files import write_atomically

FILL = 0.35  # opacity of a label's interior; its border is drawn opaque


def most_labelled_slice(label: np.ndarray) -> int:
    """Return the index along the last axis with the most labelled voxels; the middle one where nothing is labelled.

    Args:
        label: label map (X, Y, Z), 0 is background.
    """
    counts = (np.asarray(label) > 0).sum(axis=(0, 1))
    return int(counts.argmax()) if counts.any() else label.shape[-1] // 2


def overlay_panels(
    image: np.ndarray, label: np.ndarray | None, prediction: np.ndarray, index: int, colours: Mapping[int, str]
) -> np.ndarray:
    """Return image, truth and prediction side by side for one axial slice.

    Args:
        image: one channel (X, Y, Z), any intensity unit; shown from its 1st to its 99.5th percentile.
        label: truth (X, Y, Z) integer, or None (two panels then).
        prediction: (X, Y, Z) integer.
        index: slice along Z.
        colours: ``#rrggbb`` per label id.

    Returns:
        RGB (rows, columns, 3) float32 in [0, 1], anterior up; the first x of the array (the patient's left in RAS
        order) stands at the left of each panel.
    """
    grey = to_grey(upright(image[..., index]), grey_window(image))
    panels = [grey]
    panels += [paint(grey, upright(m[..., index]), colours) for m in (label, prediction) if m is not None]
    return np.concatenate(panels, axis=1).astype(np.float32)


def save_overlay_figure(
    path: str | Path,
    image: np.ndarray,
    label: np.ndarray | None,
    prediction: np.ndarray,
    colours: Mapping[int, str],
    title: str,
) -> None:
    """Write a PNG of the middle and of the most labelled slice (image, truth, prediction); see ``overlay_panels``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    reference = prediction if label is None else label
    figure = Figure(figsize=(9, 6.6), dpi=110, facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    names = ["image", "prediction"] if label is None else ["image", "truth", "prediction"]
    rows = (("middle slice", image.shape[-1] // 2), ("most labelled slice", most_labelled_slice(reference)))
    for axes, (name, index) in zip(figure.subplots(2, 1), rows, strict=True):
        axes.imshow(overlay_panels(image, label, prediction, index, colours), interpolation="nearest")
        axes.set_title(f"{name} ({index}): {' | '.join(names)}", color="white", fontsize=9)
        axes.set_axis_off()
    figure.suptitle(title, color="white", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="black")
    write_atomically(path, buffer.getvalue())


def upright(plane: np.ndarray) -> np.ndarray:
    """Turn a plane (first axis to the right, second axis up) into picture rows, the end of the second axis on top."""
    return np.flipud(np.asarray(plane).T)


def grey_window(image: np.ndarray) -> tuple[float, float]:
    """Return what is shown as black and as white: the 1st and the 99.5th percentile of the whole image."""
    low, high = np.percentile(image, [1.0, 99.5])
    return float(low), float(high)


def to_grey(plane: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Return picture rows as grey RGB (rows, columns, 3) float32 in [0, 1]; ``window`` is what is black and white."""
    low, high = window
    scaled = (plane.astype(np.float32) - low) / max(high - low, float(np.finfo(np.float32).tiny))
    return np.repeat(np.clip(scaled, 0.0, 1.0)[..., None], 3, axis=-1)


def paint(grey: np.ndarray, plane: np.ndarray, colours: Mapping[int, str]) -> np.ndarray:
    """Return a copy of the RGB picture with every label of ``plane`` tinted in its colour (``#rrggbb``), 0 left out."""
    painted = grey.copy()
    for label, colour in colours.items():
        inside = plane == label
        if label == 0 or not inside.any():
            continue
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float32) / 255.0
        border = inside & ~ndimage.binary_erosion(inside)
        painted[inside] = (1 - FILL) * painted[inside] + FILL * rgb
        painted[border] = rgb
    return painted
