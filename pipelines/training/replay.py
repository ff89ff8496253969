"""A training step that went wrong, kept on disk and run again: is it the data, the weights, or the arithmetic?

The file holds the batch, the weights as they were before the step, and what is needed to build the network again. It is
run in the arithmetic of the run and in float32 side by side. Random layers (dropout) draw anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.utils import convert_to_tensor
from torch import nn

from pipelines import tensorfile
from pipelines.inference.inferers import PRECISIONS, AutocastInferer
from pipelines.training.checkpoints import distinct_tensors, load_tensors
from transforms.errors import BundleError, UsageError

BATCH, NETWORK = "batch/", "network/"
KEYS = ("image", "label")
CONFIG = "config.yaml"


@dataclass
class Pass:
    """What one forward and backward pass gave.

    Attributes:
        precision: ``fp32``, ``bf16`` or ``fp16``.
        terms: value of the loss and of each of its terms.
        first_bad_module: name and type of the first module that gave something not finite, or an empty text.
        logits: figures of the network's output.
        largest_gradient: the parameter with the largest norm of its gradient, and this norm.
    """

    precision: str
    terms: dict[str, float] = field(default_factory=dict)
    first_bad_module: str = ""
    logits: str = ""
    largest_gradient: tuple[str, float] = ("", math.nan)


@dataclass(frozen=True)
class Replay:
    """What ``replay`` found; as text, a plain table.

    Attributes:
        header: of the file.
        inputs: one line per case and channel, and per label.
        bad_inputs: what of the batch is not finite.
        bad_weights: parameters and buffers that are not finite, with the number of such values.
        passes: in the arithmetic of the run, then in float32.
    """

    header: dict[str, Any]
    inputs: list[str]
    bad_inputs: list[str]
    bad_weights: list[str]
    passes: list[Pass]

    @property
    def verdict(self) -> str:
        """One sentence: where to look first."""
        run, plain = self.passes[0], self.passes[-1]
        if self.bad_inputs:
            return f"the data are at fault: {'; '.join(self.bad_inputs)}"
        if self.bad_weights:
            return f"the weights were not finite before this step: {'; '.join(self.bad_weights)}"
        if not _sound(run) and _sound(plain):
            where = f", first in {run.first_bad_module}" if run.first_bad_module else ", in the loss or its gradient"
            return f"{run.precision} overflows{where}; float32 does not: train with --precision fp32 or bf16"
        if not _sound(plain):
            where = plain.first_bad_module or "the loss, or its gradient: the network's output is finite"
            return f"not finite in float32 either, first in {where}: lower learning_rate or clip_norm"
        return "not reproduced: this step is finite here (dropout, another device, or another process was at fault)"

    def __str__(self) -> str:
        header = self.header
        lines = [f"{name:<16}{header[name]}" for name in ("run", "phase", "epoch", "iteration") if name in header]
        lines.append(f"{'cases':<16}{', '.join(header.get('cases', [])) or 'unnamed'}")
        lines += [f"{'then':<16}{name} {value}" for name, value in header.get("figures", {}).items()]
        lines += ["", *self.inputs, ""]
        names = list(dict.fromkeys(name for each in self.passes for name in each.terms))
        rows = [["", *(each.precision for each in self.passes)]]
        rows += [[name, *(f"{each.terms.get(name, math.nan):.6g}" for each in self.passes)] for name in names]
        rows.append(["logits", *(each.logits for each in self.passes)])
        rows.append(["first not finite", *(each.first_bad_module or "none" for each in self.passes)])
        rows.append(
            [
                "largest gradient",
                *(f"{each.largest_gradient[0]} {each.largest_gradient[1]:.4g}" for each in self.passes),
            ]
        )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines += ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, "", self.verdict])


def save_batch(path: str | Path, batch: Mapping[str, Any], network: nn.Module, header: Mapping[str, Any]) -> None:
    """Keep a batch and the network's weights for ``replay``, completely or not at all.

    Args:
        path: in a folder of the run, so that its ``config.yaml`` is found above it.
        batch: of ``collate_batch``: image (B, C, *spatial), label, case ids.
        network: as it was before the step.
        header: JSON-able: ``contract``, ``precision``, and where there are several, the ``phase``; epoch, iteration and
            ``figures`` (name -> text, because JSON has no NaN) are shown.

    Raises:
        ResourceError: it cannot be written.
    """
    tensors = {BATCH + key: convert_to_tensor(batch[key]) for key in KEYS if key in batch}
    tensors |= {NETWORK + name: tensor for name, tensor in distinct_tensors(network).items()}
    tensorfile.write_tensors(path, tensors, {**header, "cases": [str(case) for case in batch.get("case", [])]})


def replay(path: str | Path, precision: str | None = None) -> Replay:
    """Run a kept step again, in the arithmetic of its run (or in ``precision``) and in float32.

    Network and loss are built from the ``config.yaml`` of the run; neither its data nor its other files are needed.

    Raises:
        UsageError: an unknown precision, or no such file.
        BundleError: the file is damaged, the run's configuration is not there, or it builds another network.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file", "expected a batch kept by a run", "see batches/ in the run's folder")
    if precision is not None and precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}", f"expected {', '.join(PRECISIONS)}", "correct it")
    tensors, header = tensorfile.read_tensors(path)
    batch = {key: tensors[BATCH + key] for key in KEYS if BATCH + key in tensors}
    if len(batch) < len(KEYS):
        raise BundleError(f"{path}: no batch", f"expected {' and '.join(KEYS)} in it", "name a file of batches/")
    parser = _parser(path, header)
    network, loss = parser.get_parsed_content("network_def"), _loss(parser, header)
    weights = {name.removeprefix(NETWORK): value for name, value in tensors.items() if name.startswith(NETWORK)}
    load_tensors(network, weights, str(path))
    asked = precision or header.get("precision") or parser.get_parsed_content("arithmetic")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs, bad_inputs = _describe(batch, header.get("cases", []))
    passes = [run_pass(network.to(device), loss, batch, name, device) for name in dict.fromkeys([asked, "fp32"])]
    bad_weights = [
        f"{name} ({_not_finite(value)} of {value.numel()})" for name, value in weights.items() if _bad(value)
    ]
    return Replay(header, inputs, bad_inputs, bad_weights, passes)


def run_pass(
    network: nn.Module,
    loss: Callable[[Any, torch.Tensor], torch.Tensor],
    batch: Mapping[str, torch.Tensor],
    precision: str,
    device: torch.device,
) -> Pass:
    """Run the network on a batch in train mode, the loss, and the way back; the weights stay as they are."""
    result = Pass(precision)

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not result.first_bad_module and any(_bad(tensor) for tensor in _tensors(output)):
                result.first_bad_module = f"{name or 'the network'} ({type(module).__name__})"

        return hook

    network.train()
    network.zero_grad(set_to_none=True)
    hooks = [module.register_forward_hook(watch(name)) for name, module in network.named_modules()]
    try:
        logits = AutocastInferer(precision)(batch["image"].to(device), network)
    finally:
        for hook in hooks:
            hook.remove()
    value = loss(logits, batch["label"].to(device)).mean()
    value.backward()
    terms = {"loss": value.detach(), **getattr(loss, "last_terms", {})}
    result.terms = {name: float(term) for name, term in terms.items()}
    result.logits = _figures(torch.cat([tensor.detach().flatten() for tensor in _tensors(logits)]))
    norms = {n: float(p.grad.float().norm()) for n, p in network.named_parameters() if p.grad is not None}
    if norms:
        # NaN compares as nothing: put it above everything
        result.largest_gradient = max(norms.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
    network.zero_grad(set_to_none=True)
    return result


def _parser(path: Path, header: Mapping[str, Any]) -> ConfigParser:
    """Return the parser of the run's configuration, with the contract of then: its data need not be here."""
    found = [folder / CONFIG for folder in path.resolve().parents if (folder / CONFIG).is_file()]
    if not found:
        raise BundleError(
            f"{path}: no {CONFIG} above it", "the network is built from the run's configuration", "leave it in its run"
        )
    parser = ConfigParser()
    parser.read_config(str(found[0]))
    if "contract" in header:
        parser["contract"] = header["contract"]
    parser.parse()
    return parser


def _loss(parser: ConfigParser, header: Mapping[str, Any]) -> Any:
    """Return the loss of the step's phase."""
    loss = parser.get_parsed_content("loss")
    if isinstance(loss, nn.Module):
        return loss
    phases = {phase.name: phase for phase in parser.get_parsed_content("plan")}
    name = header.get("phase", next(iter(phases)))
    if name not in phases:
        raise BundleError(f"phase {name!r}", f"the configuration has {', '.join(phases)}", "leave the file in its run")
    return loss(phases[name].loss)


def _describe(batch: Mapping[str, torch.Tensor], cases: list[str]) -> tuple[list[str], list[str]]:
    """Return a line of figures per case and channel, and what is not finite."""
    lines, bad = [], []
    for key, tensor in batch.items():
        for index, item in enumerate(tensor):
            case = cases[index] if index < len(cases) else str(index)
            for channel, values in enumerate(item):
                lines.append(f"{key} of case {case}, channel {channel}: {_figures(values)}")
                if _bad(values):
                    bad.append(f"{key} of case {case}, channel {channel} has {_not_finite(values)} values not finite")
    return lines, bad


def _figures(values: torch.Tensor) -> str:
    values = values.detach().float()
    finite = values[torch.isfinite(values)]
    limits = f"{float(finite.min()):.4g} to {float(finite.max()):.4g}" if finite.numel() else "nothing finite"
    return f"{limits}, {int(values.isnan().sum())} NaN, {int(values.isinf().sum())} infinite"


def _sound(result: Pass) -> bool:
    values = [*result.terms.values(), result.largest_gradient[1]]
    return not result.first_bad_module and all(math.isfinite(value) for value in values)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)


def _not_finite(tensor: torch.Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())


def _bad(tensor: torch.Tensor) -> bool:
    return not bool(torch.isfinite(tensor).all())
