"""The golden case: a small generated head and what these weights make of it, so that a copy can prove itself.

The head holds no patient: it is the phantom of ellipsoids at the contract's spacing, made as small as the network's
patch asks for, and travels through the bundle's whole chain. Kept are the inferer's response to it (probabilities, or
the fused image), which feels every weight, and the files that the bundle writes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import yaml

from pipelines import tensorfile
from pipelines.manifests.discover import MASK_ROLE
from pipelines.phantoms import LesionPrior, head_subject
from pipelines.runner import bundle_parser, run_bundle
from transforms.errors import BundleError

FOLDER, CASE = "golden", "phantom"
ABOUT, RESPONSE = f"{FOLDER}/golden.json", f"{FOLDER}/response.safetensors"
HEAD_MM = (190.0, 230.0, 220.0)  # of the phantom's field of view
FINEST_MM, COARSEST_MM = 0.5, 6.0  # that the phantom can be made with
MOST_VOXELS, SLICES = 80, 24  # along an axis; along one that the network does not see
SEED = 0
LESIONS = LesionPrior(30.0, largest_ml=60.0)
# on every machine alike, whatever the bundle's defaults are
FIXED = {"backend": "torch", "device_name": "cpu", "precision": "fp32", "seed": SEED, "sampling_steps": 2, "samples": 1}


@dataclass(frozen=True)
class Tolerance:
    """What may differ on another machine or backend: any value of the response, and the share of label voxels."""

    response: float
    voxels: float


TOLERANCES = {
    "torch": Tolerance(1e-4, 1e-4),
    "pt2": Tolerance(1e-4, 1e-4),
    "torchscript": Tolerance(1e-4, 1e-4),
    "onnxruntime": Tolerance(1e-3, 1e-3),
    "openvino": Tolerance(5e-3, 1e-3),
}


@dataclass(frozen=True)
class Response:
    """What a bundle makes of the golden case: the inferer's response, and every volume that it writes, by name."""

    response: np.ndarray
    volumes: Mapping[str, np.ndarray]


def golden_scans(contract: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the images of the golden case as NIfTI files (not compressed: that differs between versions), by name.

    Args:
        contract: of the weights. A modality that the phantom does not know looks like a T1.
    """
    shown = {name: _contrast(name) for name in contract["modalities"]}
    spacing = _phantom_spacing(contract["spacing"], contract["patch_size"])
    contrasts = list(dict.fromkeys(shown.values()))
    head = head_subject(SEED, 0, spacing, contrasts, "ellipsoid", lesions=LESIONS)
    affine = np.diag([*map(float, contract["spacing"]), 1.0])  # a small head, as far as the chain can tell
    volumes: dict[str, np.ndarray] = {name: head.images[contrast].astype(np.int16) for name, contrast in shown.items()}
    if contract.get("foreground") == "mask":
        volumes[MASK_ROLE] = head.brain
    return {f"{name}.nii": _nifti(volume, affine) for name, volume in volumes.items()}


def run_golden(bundle: str | Path, scans: str | Path, overrides: Mapping[str, Any] | None = None) -> Response:
    """Run a bundle on the golden case as ``fiducial predict`` would, on one thread of the CPU in float32.

    Args:
        bundle: its folder.
        scans: folder of the case.
        overrides: further options of ``inference.yaml``, for instance the backend.
    """
    known = yaml.safe_load((Path(bundle) / "configs" / "inference.yaml").read_text())
    fixed = {key: value for key, value in FIXED.items() if key in known}
    with _one_thread(), tempfile.TemporaryDirectory() as scratch:
        given = {**fixed, "input": str(scans), "output_dir": str(Path(scratch, "out")), **(overrides or {})}
        with bundle_parser(str(bundle), "inference", given) as parser, torch.no_grad():
            (item,) = parser.get_parsed_content("data")
            image = parser.get_parsed_content("preprocessing")(item)["image"]
            network = parser.get_parsed_content("network").eval()
            response = parser.get_parsed_content("inferer")(torch.as_tensor(image)[None], network)
        run_bundle(str(bundle), "inference", given)
        files = sorted(Path(scratch, "out").glob("*.nii.gz"))
        volumes = {file.name.removesuffix(".gz"): np.asarray(nib.load(file).dataobj) for file in files}
    return Response(torch.as_tensor(response).float().cpu().numpy(), volumes)


def golden_files(bundle: Path, contract: Mapping[str, Any]) -> dict[str, bytes]:
    """Make the golden case of a bundle and return its files by name in the bundle.

    Args:
        bundle: folder with configurations and weights.
        contract: of the weights.
    """
    scans = golden_scans(contract)
    with tempfile.TemporaryDirectory() as scratch:
        case = Path(scratch, CASE)
        case.mkdir()
        for name, content in scans.items():
            (case / name).write_bytes(content)
        expected = run_golden(bundle, case)
        tensorfile.write_tensors(
            Path(scratch, "response"), {"response": torch.from_numpy(expected.response)}, {"case": CASE}
        )
        response = Path(scratch, "response").read_bytes()
    affine = np.diag([*map(float, contract["spacing"]), 1.0])
    about = {
        "case": "generated head of ellipsoids, no patient",
        "shape": list(next(iter(expected.volumes.values())).shape),
        "options": FIXED,
        "tolerances": {backend: asdict(tolerance) for backend, tolerance in TOLERANCES.items()},
        "volumes": {name: _described(volume) for name, volume in expected.volumes.items()},
    }
    return {
        ABOUT: (json.dumps(about, indent=2) + "\n").encode(),
        RESPONSE: response,
        **{f"{FOLDER}/input/{CASE}/{name}": content for name, content in scans.items()},
        **{f"{FOLDER}/expected/{name}": _nifti(volume, affine) for name, volume in expected.volumes.items()},
    }


def read_golden(bundle: str | Path) -> tuple[Response, dict[str, Tolerance]]:
    """Return what an exported bundle is to answer, and with which tolerance by backend.

    Raises:
        BundleError: the bundle has no golden case, or it cannot be read.
    """
    bundle = Path(bundle)
    try:
        about = json.loads((bundle / ABOUT).read_text())
        tensors, _ = tensorfile.read_tensors(bundle / RESPONSE)
        files = sorted((bundle / FOLDER / "expected").glob("*.nii"))
        volumes = {file.name: np.asarray(nib.load(file).dataobj) for file in files}
        tolerances = {backend: Tolerance(**values) for backend, values in about["tolerances"].items()}
        if set(volumes) != set(about["volumes"]):
            raise ValueError(f"expected volumes {sorted(about['volumes'])}, found {sorted(volumes)}")
        return Response(tensors["response"].numpy(), volumes), tolerances
    except (OSError, ValueError, KeyError, TypeError, nib.filebasedimages.ImageFileError) as problem:
        raise BundleError(
            f"bundle {bundle.name}: its golden case cannot be read",
            f"{type(problem).__name__}: {problem}",
            "fetch the bundle again; a folder of the repository has none: export a run",
        ) from problem


def differences(expected: Response, found: Response) -> dict[str, float]:
    """Return by how much a bundle's answer differs: ``response`` (largest), and per volume.

    Of label maps it is the share of voxels that differ, of other volumes the largest difference. Another shape or a
    volume that is not there is infinitely different.
    """
    figures = {"response": _largest(expected.response, found.response)}
    for name in sorted({*expected.volumes, *found.volumes}):
        figures[name] = _volume_difference(expected.volumes.get(name), found.volumes.get(name))
    return figures


def beyond(figures: Mapping[str, float], expected: Response, tolerance: Tolerance) -> list[str]:
    """Return in words what differs by more than the tolerance; a figure that is no number does too."""
    said = []
    for name, figure in figures.items():
        of_labels = name in expected.volumes and expected.volumes[name].dtype.kind in "ui"
        limit = tolerance.voxels if of_labels else tolerance.response
        if not figure <= limit:
            said.append(f"{name} differs by {figure:.3g}, {limit:g} allowed")
    return said


def _volume_difference(expected: np.ndarray | None, found: np.ndarray | None) -> float:
    if expected is None or found is None or expected.shape != found.shape:
        return float("inf")
    if expected.dtype.kind in "ui":
        return float(np.mean(expected != found))
    return _largest(expected, found)


def _largest(expected: np.ndarray, found: np.ndarray) -> float:
    if expected.shape != found.shape:
        return float("inf")
    return float(np.abs(expected.astype(np.float64) - found).max())


def _contrast(modality: str) -> str:
    name = modality.lower()
    return next((contrast for contrast in ("flair", "ct", "t2") if name == contrast or name.startswith(contrast)), "t1")


def _phantom_spacing(spacing: Sequence[float], patch: Sequence[int]) -> list[float]:
    """Return the spacing at which a head has a few more voxels than the patch, and never many."""
    sizes = [min(round(1.25 * size), MOST_VOXELS) if size > 1 else SLICES for size in patch]
    scale = max(mm / (size * step) for mm, size, step in zip(HEAD_MM, sizes, spacing, strict=True))
    return [float(np.clip(scale * step, FINEST_MM, COARSEST_MM)) for step in spacing]


def _nifti(volume: np.ndarray, affine: np.ndarray) -> bytes:
    image = nib.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm")
    return image.to_bytes()


def _described(volume: np.ndarray) -> dict[str, Any]:
    if volume.dtype.kind in "ui":
        values, counts = np.unique(volume, return_counts=True)
        return {"voxels": {str(value): int(count) for value, count in zip(values, counts, strict=True)}}
    return {"mean": float(volume.mean()), "max": float(volume.max())}


@contextmanager
def _one_thread() -> Iterator[None]:
    """The order of sums, and so the last bits, depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
