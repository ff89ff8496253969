"""The network in the formats that other runtimes read: ``.pt2`` (bit for bit), ONNX, and a TorchScript trace.

A graph is one call of the network: windows, flips and the steps of a sampler stay outside. It takes any number of
images and any size that the network can pool. Equal weights give equal bytes: what a format adds of its own (paths of
the machine, stack traces, counters, the order of a dictionary) is taken off again.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export

from pipelines.export.archive import write_archive
from pipelines.files import write_atomically
from pipelines.names import nearest
from pipelines.networks import SliceStackNetwork, input_divisor
from transforms.errors import BundleError, UsageError

if TYPE_CHECKING:
    import onnx

FILES = {"pt2": "model.pt2", "onnx": "model.onnx", "torchscript": "model.ts"}
"""File of each format, named as MONAI's bundles name them in ``models/``."""
INPUT, OUTPUT = "image", "output"
OPSET = 20
_LARGEST_BATCH, _LARGEST_AXIS = 4096, 8192
_AXES = "xyz"
_SYMBOL = re.compile(r"\bs\d+\b")
_MANGLED = re.compile(rb"___torch_mangle_(\d+)")


class _WholeStacks(nn.Module):
    """A ``SliceStackNetwork`` that takes all slices in one pass: a graph has no loop over a depth it does not know."""

    def __init__(self, stack: SliceStackNetwork) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        return self.stack.segment(volume, 0, volume.shape[-1])


def write_formats(
    network: nn.Module, channels: int, patch_size: Sequence[int], folder: str | Path, formats: Sequence[str] = ()
) -> dict[str, Path]:
    """Write a trained network as ``model.pt2``, ``model.onnx`` and ``model.ts``.

    All map ``image`` (B, channels, *spatial), float32, to the output of the network in eval mode. B is free, and so is
    every axis in multiples of what the network pools it by, from twice that; where the network does not say by what
    it pools (``input_divisor``), the axes are fixed to the patch.

    Args:
        network: on any device, in any mode; it is not changed.
        channels: of its input; for a denoiser with x_t and t (C + 2).
        patch_size: of the windows it is run on; must be a size that it accepts.
        folder: where the files go; made if it is not there.
        formats: of ``FILES``; () = all.

    Returns:
        The path of each format, in the order of ``FILES``.

    Raises:
        UsageError: an unknown format.
        BundleError: a patch that the network cannot pool, a package that is not installed, or a network that does not
            follow the rules of a graph (the message holds the exporter's own).
        ResourceError: the disk is full or the folder read-only.
    """
    asked = _known(formats)
    if "onnx" in asked:
        require_onnx()
    divisor = input_divisor(network, len(patch_size))
    _check_patch(patch_size, divisor)
    graph = _graph_of(network)
    size = patch_size if divisor is None else [2 * step for step in divisor]
    example = torch.zeros(2, channels, *size)
    content: dict[str, bytes] = {}
    with _quiet(), torch.no_grad():
        if {"pt2", "onnx"} & set(asked):
            program = _refusing("pt2", lambda: _exported(graph, example, divisor))
            if "pt2" in asked:
                content["pt2"] = _refusing("pt2", lambda: _pt2_bytes(program))
            if "onnx" in asked:
                content["onnx"] = _refusing("onnx", lambda: _onnx_bytes(program))
        if "torchscript" in asked:
            content["torchscript"] = _refusing("torchscript", lambda: _torchscript_bytes(graph, example))
    paths = {name: Path(folder) / FILES[name] for name in FILES if name in content}
    for name, path in paths.items():
        write_atomically(path, content[name])
    return paths


def write_formats_of(
    bundle: str | Path, weights: str | Path, folder: str | Path = "", formats: Sequence[str] = ()
) -> dict[str, Path]:
    """Write the formats of trained weights, the network built by the bundle from their contract.

    Args:
        bundle: its folder, or the name of one in this repository.
        weights: safetensors with a contract.
        folder: where the files go; empty = beside the weights, where ``fiducial predict`` finds them.
        formats: of ``FILES``; () = all.

    Raises:
        BundleError, UsageError, ResourceError: as ``write_formats``, or the weights are not the bundle's.
    """
    from pipelines.runner import absolute, bundle_parser
    from pipelines.training.checkpoints import load_weights, read_contract

    weights = Path(absolute(weights))
    target = absolute(folder) if folder else weights.parent
    contract = read_contract(weights)
    with bundle_parser(str(bundle), "inference", {"checkpoint": str(weights), "device_name": "cpu"}) as parser:
        network = load_weights(parser.get_parsed_content("network_def"), weights)
    return write_formats(network, input_channels(contract), contract["patch_size"], target, formats)


def input_channels(contract: Mapping[str, Any]) -> int:
    """Return the channels of the input: the modalities; of a denoiser MRI, windows of the CT, guess, x_t and t."""
    return len(contract["windows"]) + 4 if "schedule" in contract else len(contract["modalities"])


def require_onnx() -> None:
    """Refuse to write ONNX without the packages that do it.

    Raises:
        BundleError: one of them is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as missing:
        raise BundleError(
            "format onnx: cannot be written",
            f"{missing.name} is not installed",
            "pip install 'fiducial[onnx]'",
        ) from missing


def _known(formats: Sequence[str]) -> list[str]:
    for name in formats:
        if name not in FILES:
            raise UsageError(f"format {name!r}", f"valid: {', '.join(FILES)}", nearest(name, FILES))
    return [name for name in FILES if not formats or name in formats]


def _check_patch(patch_size: Sequence[int], divisor: Sequence[int] | None) -> None:
    for axis, (size, step) in enumerate(zip(patch_size, divisor or [1] * len(patch_size), strict=True)):
        if size < 1 or size % step:
            raise BundleError(
                f"export: patch_size {list(patch_size)}",
                f"axis {axis} has {size} voxels, the network pools it by {step}",
                "export with the patch size of the weights' contract",
            )


def _graph_of(network: nn.Module) -> nn.Module:
    """Return a copy on the CPU, in eval mode, without loops over slices."""
    graph = copy.deepcopy(network).cpu().float().eval().requires_grad_(False)
    if isinstance(graph, SliceStackNetwork):
        return _WholeStacks(graph)
    for module in list(graph.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, SliceStackNetwork):
                setattr(module, name, _WholeStacks(child))
    return graph


def _exported(graph: nn.Module, example: torch.Tensor, divisor: Sequence[int] | None) -> ExportedProgram:
    shape: dict[int, Any] = {0: Dim("batch", max=_LARGEST_BATCH)}
    for axis, step in enumerate(divisor or ()):
        multiple = Dim(_AXES[axis], max=_LARGEST_AXIS // step)
        shape[axis + 2] = multiple if step == 1 else step * multiple
    program = export(graph, (example,), dynamic_shapes=(shape,), strict=False)
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # lines of files on this machine
    program._example_inputs = None  # an image in every copy, for nothing
    return program


def _pt2_bytes(program: ExportedProgram) -> bytes:
    stream = io.BytesIO()
    torch.export.save(program, stream)
    return _canonical_zip(
        {
            name: json.dumps(json.loads(entry), sort_keys=True).encode() if name.endswith(".json") else entry
            for name, entry in _zip_entries(stream).items()
        }
    )


def _onnx_bytes(program: ExportedProgram) -> bytes:
    import onnx

    exported = torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=[OUTPUT], verbose=False
    )
    assert exported is not None  # without a file name the result is returned
    model = exported.model_proto
    _strip(model)
    _name_axes(model)
    onnx.checker.check_model(model)
    return model.SerializeToString(deterministic=True)


def _torchscript_bytes(graph: nn.Module, example: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    # a trace keeps the process's choices for convolutions, and a training in this process may have made others
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        torch.jit.trace(graph, example, check_trace=False)  # now the process knows every class, as in any later trace
        torch.jit.save(torch.jit.trace(graph, example, check_trace=False), stream)
    kept = {name: entry for name, entry in _zip_entries(stream).items() if not name.endswith(".debug_pkl")}
    named = b"\n".join([*(name.encode() for name in kept), *(kept[name] for name in kept if _names_classes(name))])
    counters = sorted({int(counter) for counter in _MANGLED.findall(named)})

    def renumbered(text: bytes) -> bytes:
        # classes of one name are told apart by a counter of the process
        return _MANGLED.sub(lambda found: b"___torch_mangle_%d" % counters.index(int(found[1])), text)

    return _canonical_zip(
        {
            renumbered(name.encode()).decode(): renumbered(entry) if _names_classes(name) else entry
            for name, entry in kept.items()
        }
    )


def _names_classes(name: str) -> bool:
    """Return whether a file of a TorchScript archive names classes: in source, or in a pickle's lines of text."""
    return name.endswith((".py", ".pkl"))


def _zip_entries(stream: io.BytesIO) -> dict[str, bytes]:
    with zipfile.ZipFile(stream) as archive:
        names = [entry.filename for entry in archive.infolist()]
        return {name: archive.read(name) for name in names if not name.endswith("serialization_id")}


def _canonical_zip(entries: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    write_archive(entries, stream)
    return stream.getvalue()


def _strip(model: onnx.ModelProto) -> None:
    """Take off what the exporter notes about this machine and process: it changes no value."""
    graph = model.graph
    model.producer_version = model.producer_version.split("+")[0]
    model.doc_string = graph.doc_string = ""
    del graph.value_info[:]
    noted = [model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *model.functions]
    noted += [node for function in model.functions for node in function.node]
    for part in noted:
        part.doc_string = ""
        del part.metadata_props[:]


def _name_axes(model: onnx.ModelProto) -> None:
    """Give the free axes names: batch, and a multiple of x, y or z for each of space."""
    names: dict[str, str] = {}
    (image,) = model.graph.input
    for position, axis in enumerate(image.type.tensor_type.shape.dim):
        for symbol in _SYMBOL.findall(axis.dim_param):
            names[symbol] = "batch" if position == 0 else _AXES[position - 2]
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = _SYMBOL.sub(lambda found: names.get(found[0], found[0]), axis.dim_param)


def _refusing(name: str, write: Callable[[], Any]) -> Any:
    """Return what ``write`` returns; an exporter's own error becomes three lines."""
    try:
        return write()
    except Exception as problem:  # exporters raise whatever the network's code makes them raise
        first = str(problem).strip().split("\n")[0][:300]
        raise BundleError(
            f"format {name}: the network cannot be exported",
            f"{type(problem).__name__}: {first}",
            "leave the format out, or avoid in the network what depends on values or loops over sizes",
        ) from problem


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence deprecations and notes of the exporters that a user can do nothing about."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
