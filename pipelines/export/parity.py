"""Does an exported network answer like the original? Measured on whole cases through the bundle's own evaluator.

Every backend runs the same windows, flips and way back to the image's grid as the weights in float32, and is compared
with them: label by label (Dice), voxel by voxel (which labels flip, and whether they lie at a border), and by the
largest difference of the response. What is beyond a gate does not pass, and ``auto`` will not choose it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator
from monai.inferers import Inferer
from scipy import ndimage

from pipelines.files import write_json
from pipelines.inference.backends import FILE_OF, NAMES, PARITY, not_installed, open_backend
from pipelines.manifests.digest import file_digest
from transforms.errors import BundleError

MAY_FAIL = frozenset(["openvino:bf16"])
"""Reduced precision is a bonus: where it does not pass it is not used, and the export stands."""


@dataclass(frozen=True)
class Gates:
    """What a backend may differ by, in each case; None = not asked.

    Args:
        dice_difference: 1 - Dice of its label map and the original's, of the worst label.
        boundary_flips: voxels with another label that touch a border between labels of the original.
        inner_flips: voxels with another label anywhere else: rounding moves borders, it does not make islands.
        max_difference: of the response (probabilities), any voxel.
        image_difference: the same, for bundles whose response is an image and no label map.
    """

    dice_difference: float | None = 1e-4
    boundary_flips: int | None = None
    inner_flips: int | None = None
    max_difference: float | None = None
    image_difference: float | None = 1e-3


@dataclass(frozen=True)
class CaseResponse:
    """What a network makes of a case: the inferer's response (K, *spatial) and the label map (X, Y, Z), if any."""

    case: str
    response: np.ndarray
    label_map: np.ndarray | None


def responses(evaluator: SupervisedEvaluator, network: torch.nn.Module, labelled: bool = True) -> list[CaseResponse]:
    """Run a network over all cases of an evaluator.

    Args:
        evaluator: of the bundle; its network and inferer are put back afterwards. Its handlers run as well.
        network: takes its place.
        labelled: whether the postprocessing leaves label maps under ``pred``.
    """
    found: list[CaseResponse] = []
    before = evaluator.network, evaluator.inferer
    heard = _Heard(evaluator.inferer)

    def keep(engine: Engine) -> None:
        for item, batch, response in zip(engine.state.output, engine.state.batch, heard.last, strict=True):
            labels = np.asarray(torch.as_tensor(item["pred"]).cpu())[0].astype(np.int32) if labelled else None
            found.append(CaseResponse(str(batch["case"]), response.float().cpu().numpy(), labels))

    with evaluator.add_event_handler(Events.ITERATION_COMPLETED, keep):
        evaluator.network, evaluator.inferer = network, heard
        try:
            evaluator.run()
        finally:
            evaluator.network, evaluator.inferer = before
    return found


def compare(original: CaseResponse, other: CaseResponse) -> dict[str, Any]:
    """Return by how much two responses to one case differ: the figures of ``Gates``, and the case.

    Raises:
        BundleError: not the same case, or arrays of another shape.
    """
    if original.case != other.case or original.response.shape != other.response.shape:
        raise BundleError(
            f"parity: case {original.case} {original.response.shape} against {other.case} {other.response.shape}",
            "the two must be responses to one case, on one grid",
            "compare runs of the same evaluator",
        )
    apart = np.abs(original.response - other.response)
    figures: dict[str, Any] = {
        "case": original.case,
        "max_difference": float(apart.max()) if np.isfinite(apart).all() else float("inf"),
    }
    if original.label_map is not None and other.label_map is not None:
        flipped = original.label_map != other.label_map
        border = _border(original.label_map)
        figures["dice_difference"] = dice_difference(original.label_map, other.label_map)
        figures["boundary_flips"] = int((flipped & border).sum())
        figures["inner_flips"] = int((flipped & ~border).sum())
    return figures


def dice_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Return 1 - Dice of two label maps, of the worst label but 0; 0 where neither has any label."""
    worst = 0.0
    for label in sorted({*np.unique(a), *np.unique(b)} - {0}):
        one, two = a == label, b == label
        worst = max(worst, 1 - 2 * float((one & two).sum()) / float(one.sum() + two.sum()))
    return worst


def beyond(figures: Mapping[str, Any], gates: Gates) -> list[str]:
    """Return the figures of a case that a gate does not let pass, in words."""
    limits = asdict(gates)
    image = limits.pop("image_difference")
    if "dice_difference" not in figures and limits["max_difference"] is None:
        limits["max_difference"] = image
    return [
        f"{name} {figures[name]:.3g} in case {figures['case']}, at most {limit:.3g}"
        for name, limit in limits.items()
        if limit is not None and name in figures and not figures[name] <= limit
    ]


def measure_parity(
    evaluator: SupervisedEvaluator,
    original: torch.nn.Module,
    networks: Mapping[str, torch.nn.Module],
    gates: Gates = Gates(),
    labelled: bool = True,
) -> dict[str, Any]:
    """Compare networks with the original on all cases of an evaluator.

    Args:
        evaluator: of the bundle, in float32.
        original: the network with its weights.
        networks: by the name of their backend.
        gates: what may differ.
        labelled: whether the bundle makes label maps.

    Returns:
        ``gates``, and under ``backends`` for each: ``passed``, ``reason`` where it did not, the worst value of every
        figure, and the figures of every case. JSON-able: a difference that is not finite is given as text.

    Raises:
        BundleError: the evaluator has no case.
    """
    expected = responses(evaluator, original, labelled)
    if not expected:
        raise BundleError("parity: no case", "there is nothing to compare on", "give it at least one image")
    measured: dict[str, Any] = {}
    for name, network in networks.items():
        found = responses(evaluator, network, labelled)
        cases = [compare(one, two) for one, two in zip(expected, found, strict=True)]
        reasons = [reason for figures in cases for reason in beyond(figures, gates)]
        worst = {key: max(figures[key] for figures in cases) for key in cases[0] if key != "case"}
        measured[name] = {
            "passed": not reasons,
            **({"reason": "; ".join(reasons)} if reasons else {}),
            **{key: _plain(value) for key, value in worst.items()},
            "cases": [{key: _plain(value) for key, value in figures.items()} for figures in cases],
        }
    return {"original": "weights, PyTorch, float32", "gates": asdict(gates), "backends": measured}


def require_parity(record: Mapping[str, Any], may_fail: frozenset[str] = MAY_FAIL) -> None:
    """Refuse an export of which a backend does not answer like the original.

    Raises:
        BundleError: names the backend, the case and the figure.
    """
    for name, measured in record["backends"].items():
        if not measured["passed"] and name not in may_fail:
            raise BundleError(
                f"parity: {FILE_OF[name.partition(':')[0]]} on {name} is not the network that was trained",
                measured["reason"],
                "leave the format out, or loosen the gate if the difference is acceptable for the task",
            )


def measure_bundle(
    bundle: str | Path,
    weights: str | Path,
    scans: str | Path,
    threads: int | None = None,
    gates: Gates = Gates(),
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure every exported file beside the weights on every backend that is installed, and write ``parity.json``.

    Args:
        bundle: its folder, or the name of one in this repository.
        weights: safetensors; the exported files stand beside them, and ``parity.json`` is written there.
        scans: a case folder or a folder of cases, as for ``fiducial predict``.
        threads: of the other runtimes.
        gates: what may differ.
        overrides: further options of ``inference.yaml``.

    Returns:
        The record that was written: that of ``measure_parity``, with the sha256 of the ``files``, the ``versions`` of
        the packages, and what was ``not_measured``, with the reason.

    Raises:
        BundleError, DataError: the bundle cannot be run on the scans. A gate is not raised: see ``require_parity``.
    """
    from pipelines.runner import absolute, bundle_parser

    weights = Path(absolute(weights))
    present = {name: _absent(name, weights.parent) for name in NAMES}
    fixed = {"checkpoint": str(weights), "input": absolute(scans), "output_dir": str(weights.parent / "unused"),
             "backend": "torch", "precision": "fp32", "device_name": "cpu"}  # fmt: skip
    with bundle_parser(str(bundle), "inference", {**(overrides or {}), **fixed}) as parser:
        parser["handlers"] = []  # nothing is written
        evaluator = parser.get_parsed_content("evaluator")
        labelled = "most_probable_label" in parser.get()
        networks = {name: open_backend(name, weights.parent, threads) for name, why in present.items() if not why}
        record = measure_parity(evaluator, evaluator.network, networks, gates, labelled)
    files = sorted({weights.name, *(FILE_OF[name.partition(":")[0]] for name in networks)})
    record["files"] = {name: file_digest(weights.parent / name) for name in files}
    record["versions"] = {name: _version(name) for name in ("torch", "onnxruntime", "openvino")}
    record["not_measured"] = {name: why for name, why in present.items() if why}
    write_json(weights.parent / PARITY, record)
    return record


class _Heard(Inferer):
    """Another inferer, whose last response is kept."""

    def __init__(self, inferer: Inferer) -> None:
        super().__init__()
        self.inferer = inferer
        self.last = torch.zeros(())

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        response = self.inferer(inputs, network, *args, **kwargs)
        self.last = torch.as_tensor(response).clone()
        return response


def _border(label_map: np.ndarray) -> np.ndarray:
    """Return the voxels with another label among their neighbours (over faces, edges and corners)."""
    return ndimage.maximum_filter(label_map, 3) != ndimage.minimum_filter(label_map, 3)


def _absent(name: str, folder: Path) -> str:
    backend, _, precision = name.partition(":")
    if not (folder / FILE_OF[backend]).is_file():
        return f"there is no {FILE_OF[backend]}"
    if precision == "bf16" and not torch.cpu._is_avx512_bf16_supported():
        return "this processor does not multiply bf16"
    return not_installed(name)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
