"""Networks out of an export, run by PyTorch, ONNX Runtime or OpenVINO: called like the network they were made from.

Nothing here knows the network's classes. Which backend may run is decided by ``parity.json`` beside the files: what was
measured against the original and passed, on exactly these bytes. ``auto`` takes the fastest of those; where there is
no export, the weights themselves are run.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import convert_to_dst_type

from pipelines.manifests.digest import file_digest
from pipelines.names import nearest
from transforms.errors import BundleError, UsageError

logger = logging.getLogger(__name__)

FILE_OF = {"pt2": "model.pt2", "torchscript": "model.ts", "onnxruntime": "model.onnx", "openvino": "model.onnx"}
"""What each backend reads from the folder of the weights. ``torch`` reads the weights themselves."""
NAMES = (*FILE_OF, "openvino:bf16")
PARITY = "parity.json"
FASTEST_FIRST = {"bf16": ("openvino:bf16", "openvino"), "fp32": ("openvino", "onnxruntime")}
"""What ``auto`` takes before the weights themselves, by the arithmetic of the run. PyTorch in bf16 is faster than ONNX
Runtime, which has float32 only. ``<backend>:bf16`` stands in ``parity.json`` for itself."""
_PACKAGE = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino", "openvino")}  # package, extra of ours

Run = Callable[[torch.Tensor], torch.Tensor]


class ExportedNetwork(torch.nn.Module):
    """A network without parameters: (B, C, *spatial) float32 on the CPU in, the exported network's output out.

    Args:
        run: maps a plain, contiguous float32 tensor to the output.
        backend: its name.
    """

    def __init__(self, run: Run, backend: str) -> None:
        super().__init__()
        self._run = (run,)  # in a tuple: an exported program must not be switched between modes as a submodule
        self.backend = backend

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Run the graph.

        Raises:
            BundleError: the input is not on the CPU, or the graph does not take it (the message holds the reason).
        """
        if image.device.type != "cpu":
            raise BundleError(
                f"backend {self.backend}: an image on {image.device}",
                "exported networks are run on the CPU",
                "use --device_name cpu, or --backend torch",
            )
        plain = image.as_tensor() if isinstance(image, MetaTensor) else image
        try:
            with torch.autocast("cpu", enabled=False):  # its arithmetic is that of the graph, not of the caller
                output = self._run[0](plain.detach().float().contiguous())
        except Exception as problem:  # every runtime raises its own kind
            raise BundleError(
                f"backend {self.backend}: refuses an image of shape {tuple(image.shape)}",
                f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:300]}",
                "use the channels and the patch size of the weights' contract",
            ) from problem
        return convert_to_dst_type(output, image, dtype=output.dtype)[0] if isinstance(image, MetaTensor) else output


def open_backend(name: str, folder: str | Path, threads: int | None = None) -> ExportedNetwork:
    """Open an exported network.

    Args:
        name: ``pt2`` (PyTorch, bit for bit the original), ``torchscript`` (for older runtimes), ``onnxruntime``,
            ``openvino`` (float32), ``openvino:bf16``.
        folder: holds the file, see ``FILE_OF``.
        threads: of ONNX Runtime and OpenVINO; None = as many as PyTorch uses here.

    Raises:
        UsageError: an unknown backend, or one that is not installed.
        BundleError: the file is missing or cannot be read.
    """
    backend, _, precision = name.partition(":")
    _known(name, NAMES)
    if missing := not_installed(name):
        raise UsageError(f"backend {backend}: cannot run", missing, f"pip install 'fiducial[{_PACKAGE[backend][1]}]'")
    path = Path(folder) / FILE_OF[backend]
    if not path.is_file():
        raise BundleError(
            f"backend {backend}: no {path.name} beside the weights",
            f"looked in {path.parent}",
            "export the run with this format, or use --backend torch",
        )
    count = threads or torch.get_num_threads()
    openers: dict[str, Callable[[], Run]] = {
        "pt2": lambda: _pt2(path),
        "torchscript": lambda: _torchscript(path),
        "onnxruntime": lambda: _onnxruntime(path, count),
        "openvino": lambda: _openvino(path, count, precision or "fp32"),
    }
    try:
        return ExportedNetwork(openers[backend](), name)
    except Exception as problem:  # every runtime raises its own kind
        raise BundleError(
            f"{path}: backend {backend} cannot open it",
            f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:300]}",
            "the file is damaged or was made for another version: export again",
        ) from problem


def not_installed(name: str) -> str:
    """Return what a backend lacks on this machine, in words; empty = nothing."""
    package, _ = _PACKAGE.get(name.partition(":")[0], ("torch", ""))
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"


def exported_network(
    backend: str, weights: Sequence[str | Path], device: torch.device | str, precision: str = "fp32"
) -> torch.nn.Module | None:
    """Return the exported network to run instead of the weights, or None where the weights are to be run.

    Args:
        backend: ``auto``, ``torch`` (the weights), or a backend of ``open_backend``.
        weights: one file per member of an ensemble; each member's export lies beside its weights.
        device: of the run; exported networks are run on the CPU only.
        precision: of the run; see ``FASTEST_FIRST``.

    Returns:
        A network, or a ``ModuleList`` of several.

    Raises:
        UsageError, BundleError: see ``open_backend``; and a backend whose parity was measured and did not pass, or was
            measured on other files.
    """
    _known(backend, ("auto", "torch", *NAMES))
    if backend == "torch":
        return None
    kind = torch.device(device).type
    if backend == "auto":
        if kind != "cpu":
            return None
        chosen = [choose_backend(path, precision) for path in weights]
        if "torch" in chosen:
            return None
    else:
        chosen = [backend] * len(weights)
        for path in weights:
            _refuse_failed(backend, Path(path))
    members = [open_backend(name, Path(path).parent) for name, path in zip(chosen, weights, strict=True)]
    for name, path in zip(chosen, weights, strict=True):
        logger.info("network of %s run by %s", Path(path).parent, name)
    return members[0] if len(members) == 1 else torch.nn.ModuleList(members)


def choose_backend(weights: str | Path, precision: str = "fp32") -> str:
    """Return the fastest backend that is installed and has passed its parity on the files beside ``weights``.

    ``torch`` where there is no such export. Every backend that is passed over is logged with the reason.
    """
    weights = Path(weights)
    record = read_parity(weights.parent)
    if record is None:
        return "torch"
    for name in FASTEST_FIRST.get(precision, FASTEST_FIRST["fp32"]):
        reason = not_installed(name) or why_not(record, name, weights)
        if not reason:
            return name
        logger.info("backend %s passed over: %s", name, reason)
    return "torch"


def read_parity(folder: str | Path) -> dict[str, Any] | None:
    """Return what ``parity.json`` in a folder says, None where there is none.

    Raises:
        BundleError: it cannot be read.
    """
    path = Path(folder) / PARITY
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record["backends"], dict) or not isinstance(record["files"], dict):
            raise TypeError("backends and files are not tables")
        return record
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise BundleError(
            f"{path}: unreadable", f"{type(problem).__name__}: {problem}", "export the run again"
        ) from problem


def why_not(record: Mapping[str, Any], name: str, weights: Path) -> str:
    """Return why a parity record does not allow a backend for these weights, in words; empty = it does."""
    measured = record["backends"].get(name)
    if measured is None:
        return f"{PARITY} has not measured it"
    if not measured.get("passed"):
        return f"{PARITY}: {measured.get('reason') or 'it did not pass'}"
    for file in (weights.name, FILE_OF[name.partition(":")[0]]):
        path = weights.parent / file
        if not path.is_file() or record["files"].get(file) != file_digest(path):
            return f"{file} is not the file that was measured"
    return ""


def _known(name: str, valid: Sequence[str]) -> None:
    if name not in valid:
        raise UsageError(f"backend {name!r}", f"valid: {', '.join(valid)}", nearest(name, valid))


def _refuse_failed(backend: str, weights: Path) -> None:
    record = read_parity(weights.parent)
    if record is None:
        logger.warning("backend %s: no %s beside %s; whether it agrees is not known", backend, PARITY, weights)
        return
    reason = why_not(record, backend, weights)
    if reason:
        raise BundleError(f"backend {backend}: refused for {weights}", reason, "use --backend auto or torch")


def _pt2(path: Path) -> Run:
    program = torch.export.load(path).module()

    def run(image: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return program(image)

    return run


def _torchscript(path: Path) -> Run:
    script = torch.jit.load(path, map_location="cpu")

    def run(image: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return script(image)

    return run


def _onnxruntime(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda image: torch.from_numpy(session.run(None, {given.name: image.numpy()})[0])


@functools.cache
def _openvino_core() -> Any:
    """Return the process's one ``openvino.Core``.

    The CPU plugin makes its memory the thread's stack for signals, and takes that memory back when a core goes: the
    next signal that Python handles, be it the end of a child or Ctrl-C, would end the process (OpenVINO 2026.4).
    """
    # Its import starts a module that gives the machine an identity and reports conversions unless somebody objects.
    # Where that module cannot be imported, it goes on without.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    return openvino.Core()


def _openvino(path: Path, threads: int, precision: str) -> Run:
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],  # it takes bf16 by itself where it can
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = _openvino_core().compile_model(str(path), "CPU", settings).create_infer_request()

    def run(image: torch.Tensor) -> torch.Tensor:
        result = request.infer([image.numpy()], share_inputs=True)[0]
        return torch.from_numpy(np.array(result, np.float32))  # the request keeps and overwrites its own

    return run
