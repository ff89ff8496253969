"""R20: does every step of the run do its work? One step of each kind is run, and one batch is learnt by heart.

A network that cannot learn a single batch will not learn a cohort: something on the way from the sample to the weights
is broken. Everything is tried on a copy; the batch is learnt in float32, on the smallest crop that the network takes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipelines.inference.inferers import AutocastInferer, FlipAveragingInferer
from pipelines.preflight.finding import CannotRun, Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule
from pipelines.preflight.samples import (
    AVERAGE_POOL,
    at_time,
    crop_to,
    draw_batch,
    input_shape,
    need_one_process,
    own_draws,
    predict,
    window_of,
)
from pipelines.preflight.tracing import smallest_size, tensors_in
from pipelines.training.phases import parameter_groups
from transforms.diffusion import NoiseSchedule

Limits = Mapping[str, float]
STEP_SIZE = 3e-3  # of Adam on one batch: whether it can be learnt at all, not how fast the run learns
DENOISER_STEP_SIZE = 1e-3  # its first guess is near the answer


@dataclass(frozen=True)
class Learnt:
    """How far one batch was learnt by heart.

    Attributes:
        first, last: loss, finite or not.
        steps: taken.
        dice: of the foreground in the end; None where it is no segmentation.
        mse_ratio: of a fusion: error of x0 in the end over that of the beginning.
        mse: of a fusion: error of x0 in the end.
    """

    first: float
    last: float
    steps: int
    dice: float | None = None
    mse_ratio: float | None = None
    mse: float | None = None

    def enough(self, limits: Limits) -> bool:
        """Return whether this is by heart."""
        fell = self.first - self.last >= (limits["loss_fall"] - 1e-9) * abs(self.first)
        close = self.mse_ratio is not None and self.mse_ratio < limits["mse_ratio"]
        close |= self.mse is not None and self.mse < limits["mse"]
        return fell or close or (self.dice is not None and self.dice >= limits["dice"])


def judge_learnt(found: Learnt, limits: Limits) -> list[Finding]:
    """R20: a batch that cannot be learnt by heart means a path that is broken somewhere."""
    if found.enough(limits):
        return []
    fell = "is not finite"
    if math.isfinite(found.first) and math.isfinite(found.last):
        fell = f"fell by {100 * (1 - found.last / found.first) if found.first else 0:.0f} %"
    figure = f", Dice {found.dice:.2f}" if found.dice is not None else ""
    figure += f", error of x0 at {found.mse_ratio:.2f} of its start" if found.mse_ratio is not None else ""
    return [
        Finding(
            rule="R20",
            severity="error",
            what="network: one batch cannot be learnt by heart",
            measured=f"the loss {fell} in {found.steps} steps{figure}",
            threshold=f"by {100 * limits['loss_fall']:.0f} %, or Dice {limits['dice']:g}, in {limits['steps']:g} steps",
            cause="image and label do not belong together, no gradient reaches the weights, or the loss is another's",
            fix="look at a training sample and at which parameters learn",
            evidence={"first_loss": _json(found.first), "last_loss": _json(found.last)},
        )
    ]


def judge_steps(errors: Mapping[str, str]) -> list[Finding]:
    """R20: kind of step -> what went wrong, empty where it ran."""
    return [
        Finding(
            rule="R20",
            severity="error",
            what=f"one step of {name} does not run",
            measured=error,
            threshold="it runs",
            cause="network, loss, inferer and metric do not fit together",
            fix=f"correct what {name} is put together from",
        )
        for name, error in errors.items()
        if error
    ]


def check_steps(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R20: one step of training, one window of validation and one of inference, on a copy of the network."""
    need_one_process()
    network = copy.deepcopy(inspection.need("network"))
    loss = inspection.need("loss")(inspection.need("plan")[0].loss)
    image, label = worth_learning(inspection, network, loss)
    steps: dict[str, Callable[[], object]] = {
        "training": lambda: overfit(inspection, network, loss, image, label, {"steps": 0})
    }
    if inspection.inferer is not None and inspection.validation is not None and len(inspection.validation):
        item = window_of(inspection.validation[0], input_shape(inspection)[2:])
        steps["validation"] = lambda: _validate(inspection, network.eval(), item)
        if inspection.task == "segmentation":
            average = FlipAveragingInferer(inspection.inferer, (0,))
            steps["inference"] = lambda: predict(inspection, network.eval(), item, average)
    with own_draws():
        return judge_steps({name: _error_of(step) for name, step in steps.items()})


def check_learnt(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R20: one batch is learnt by heart by a copy of the network."""
    need_one_process()
    network = copy.deepcopy(inspection.need("network"))
    loss = inspection.need("loss")(inspection.need("plan")[0].loss)
    image, label = worth_learning(inspection, network, loss)
    with own_draws():
        return judge_learnt(overfit(inspection, network, loss, image, label, limits), limits)


def worth_learning(
    inspection: Inspection, network: nn.Module, loss: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a small batch, cropped to where there is most to learn: borders of the label, errors of the first guess.

    One sample, of slices two; a fusion at t = 1, because early times, and clean inputs, leave nothing to learn.
    A lesion head of the loss can read it too.
    """
    shape = input_shape(inspection)
    number = 1 if sum(each > 1 for each in shape[2:]) > 2 else 2
    size = smallest_size(network, shape, reader=getattr(loss, "lesion_head", None))
    schedule = getattr(inspection.inferer, "schedule", None)
    if inspection.task != "fusion" or not isinstance(schedule, NoiseSchedule):
        image, label = draw_batch(inspection, number)
        return crop_to(image, label, size, _borders((label[:, :1] != 0).float()))
    image, label = at_time(*draw_batch(inspection, 4 * number), schedule, 1.0)
    with torch.no_grad():
        guess = torch.cat([AutocastInferer(inspection.precision)(each[None], network.eval()) for each in image])
    error = (guess - label[:, :1]).square()
    most = error.flatten(1).mean(1).argsort(descending=True)[:number]
    return crop_to(image[most], label[most], size, error[most])


def _borders(mask: torch.Tensor) -> torch.Tensor:
    """Return how much a mask (B, 1, *spatial) differs from its neighbourhood of three voxels."""
    axes = mask.ndim - 2
    return (mask - AVERAGE_POOL[axes](mask, [3] * axes, [1] * axes, [1] * axes, count_include_pad=False)).abs()


def overfit(
    inspection: Inspection,
    network: nn.Module,
    loss: Callable[..., torch.Tensor],
    image: torch.Tensor,
    label: torch.Tensor,
    limits: Limits,
) -> Learnt:
    """Train ``network`` (a copy) on one batch until it knows it by heart, or for ``limits["steps"]`` steps more."""
    groups = parameter_groups(network, inspection.plan[0])
    step_size = DENOISER_STEP_SIZE if inspection.task == "fusion" else STEP_SIZE
    optimizer = torch.optim.Adam([{"params": group["params"]} for group in groups], lr=step_size)
    forward = AutocastInferer("fp32")  # whether it can be learnt; the run's arithmetic is R45's, at the run's own size
    network.train()
    found: Learnt | None = None
    first_error = math.nan
    for step in range(int(limits["steps"]) + 1):
        optimizer.zero_grad()
        outputs = forward(image, network)
        value = loss(outputs, label)
        dice, error = _figures(inspection.task, outputs, label)
        first_error = error if step == 0 else first_error
        figures = (error / max(first_error, 1e-12), error) if inspection.task == "fusion" else ()
        first = float(value.detach()) if found is None else found.first
        found = Learnt(first, float(value.detach()), step, dice, *figures)
        if not math.isfinite(found.last) or (step and found.enough(limits)):
            break
        value.backward()
        optimizer.step()
    assert found is not None
    return found


@torch.no_grad()
def _figures(task: str, outputs: Any, label: torch.Tensor) -> tuple[float | None, float]:
    """Return the Dice of the foreground, and the mean squared error of a fused image."""
    main = outputs if isinstance(outputs, torch.Tensor) else next(tensor for _, tensor in tensors_in(outputs))
    if task == "fusion":
        return None, float((main[:, :1].float() - label[:, :1]).square().mean())
    if task != "segmentation":
        return None, math.nan
    logits = main[:, 0] if main.ndim == label.ndim + 1 else main
    predicted = logits.argmax(1, keepdim=True) if logits.shape[1] > 1 else (logits > 0).to(label.dtype)
    both, sizes = ((predicted == label) & (label > 0)).sum(), (predicted > 0).sum() + (label > 0).sum()
    return (float(2 * both / sizes) if sizes else None), math.nan


def _validate(inspection: Inspection, network: nn.Module, item: Mapping[str, torch.Tensor]) -> None:
    """Run a case through inferer and metric as validation does."""
    output = predict(inspection, network, item)
    if inspection.task not in ("segmentation", "fusion"):
        return
    for metric in inspection.metrics.values():
        own = copy.deepcopy(metric)
        own.reset()
        own.update([{"pred": output[0].cpu(), "label": item["label"][0]}])


def _error_of(step: Callable[[], object]) -> str:
    try:
        step()
    except CannotRun:
        raise
    except Exception as problem:  # a step that breaks is the finding
        return " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
    return ""


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


RULES: tuple[Rule, ...] = (
    Rule("R20", "every step runs", check_steps),
    Rule(
        "R20",
        "one batch is learnt",
        check_learnt,
        {"loss_fall": 0.8, "dice": 0.9, "mse_ratio": 0.2, "mse": 1e-4, "steps": 200},
        when="smoke",
    ),
)
