"""Partial annotation (R17): a class that nobody has looked for in a case is unknown there, and teaches nothing.

What is unknown is NaN, or the value that the loss ignores, or stands outside of a mask that the loss takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch

from pipelines.preflight.components import blocks
from pipelines.preflight.finding import CannotRun, Finding
from pipelines.preflight.inspection import Inspection, as_dictionary
from pipelines.preflight.label_counts import (
    WITH_CLASSES,
    annotated_in,
    channel_of,
    foreground_names,
    ignored_value,
    losses_of,
    thinned,
    unlabelled_ids,
)
from pipelines.preflight.rule import Rule


def unknown_as_background(
    labels: Mapping[str, tuple[np.ndarray, frozenset[int]]], class_ids: Sequence[int], ignored: Collection[int]
) -> list[Finding]:
    """Find cases in which a class was not looked for, and whose label says that it is not there.

    Args:
        labels: case -> label (1, *spatial) of ids or (C, *spatial) of one channel per class, and the classes annotated.
        class_ids: foreground classes.
        ignored: label values that the loss leaves out.
    """
    wrong: dict[str, list[int]] = {}
    for name, (label, annotated) in labels.items():
        values = np.asarray(label)
        floating = np.issubdtype(values.dtype, np.floating)
        for class_id in (i for i in class_ids if i not in annotated):
            part = values[channel_of(class_id, class_ids, len(values))] if len(values) > 1 else values
            left_out = (np.isnan(part) if floating else np.zeros(part.shape, bool)) | np.isin(part, list(ignored))
            # one channel for all classes: a voxel that belongs to an annotated class is known not to be of this one
            said = ~left_out if len(values) > 1 else (part == 0) & ~left_out
            if said.any():
                wrong.setdefault(name, []).append(class_id)
    if not wrong:
        return []
    return [
        Finding(
            rule="R17",
            severity="error",
            what=f"{len(wrong)} cases are learnt as if they had none of classes that nobody has looked for in them",
            measured="; ".join(f"{name}: {ids}" for name, ids in list(wrong.items())[:3]),
            threshold="what is not annotated is ignored (NaN, or the ignore value)",
            cause="partial annotation, encoded as background",
            fix="encode classes that are not annotated as ignored, and give the loss the mask",
            source="data",
            cases=tuple(wrong),
        )
    ]


def gradient_where_unknown(
    name: str, loss: Callable[..., torch.Tensor], target: torch.Tensor, unknown: Sequence[int]
) -> list[Finding]:
    """Find a loss that moves the output of classes that are not annotated, or that they make NaN.

    Args:
        name: of the loss.
        loss: of logits and target; and of a mask (1 = annotated), if it takes one.
        target: (B, C, *spatial), one channel per class; NaN, or the ignored value, where nobody has looked.
        unknown: channels that are not annotated.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(target.shape, generator=generator).requires_grad_()
    call = loss.forward if isinstance(loss, torch.nn.Module) else loss
    if "mask" in inspect.signature(call).parameters:
        mask = torch.ones_like(target)
        mask[:, list(unknown)] = 0
        value = loss(logits, torch.nan_to_num(target), mask)
    else:
        value = loss(logits, target)
    (gradient,) = torch.autograd.grad(value, logits)
    largest = float(gradient[:, list(unknown)].abs().max()) if unknown else 0.0
    if largest == 0 and bool(torch.isfinite(gradient).all()) and bool(torch.isfinite(value.detach()).all()):
        return []
    finite = "" if bool(torch.isfinite(gradient).all()) else ", not finite"
    return [
        Finding(
            rule="R17",
            severity="error",
            what=f"loss {name} teaches classes that are not annotated (channels {list(unknown)})",
            measured=f"largest gradient {largest:.3g}{finite}, loss {float(value.detach()):.3g}",
            threshold="0",
            cause="the loss does not leave out what is unknown, or multiplies NaN by 0 instead of removing it",
            fix="remove unannotated channels before anything is computed, and divide by what is left",
        )
    ]


def mixed_without_intersection(
    mix: Callable[[frozenset[int], frozenset[int]], Collection[int]], first: frozenset[int], second: frozenset[int]
) -> list[Finding]:
    """Find a mixing augmentation that takes a class for annotated which only one of the two samples annotates.

    Args:
        mix: what is annotated in two samples -> what counts as annotated in their mixture.
        first, second: class ids.
    """
    too_many = sorted(set(mix(first, second)) - (first & second))
    if not too_many:
        return []
    return [
        Finding(
            rule="R17",
            severity="error",
            what=f"mixing two samples takes classes {too_many} for annotated in both",
            measured=f"of samples with {sorted(first)} and {sorted(second)}",
            threshold=f"the intersection, {sorted(first & second)}",
            cause="the masks of annotation are added, or not mixed at all",
            fix="intersect the masks, or mix only samples with the same classes",
        )
    ]


def partial_cases(inspection: Inspection) -> dict[str, tuple[np.ndarray, frozenset[int]]]:
    """Return case -> label and annotated classes, of the training cases in which not every class was looked for."""
    class_ids = set(foreground_names(inspection))
    cohort = inspection.cohort
    known = {case.id: case.annotated for case in cohort.cases} if cohort is not None else {}
    found = {}
    for case in map(as_dictionary, inspection.need("train").cases):
        name = str(case.get("case", ""))
        annotated = annotated_in({"annotated": case.get("annotated", known.get(name))})
        if annotated is not None and class_ids - annotated and "label" in case:
            found[name] = (case["label"], annotated)
    return found


def check_annotation(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R17: what is unknown is encoded as such, and reaches no gradient."""
    partial = partial_cases(inspection)
    if not partial:
        return []
    class_ids = sorted(foreground_names(inspection))
    losses = losses_of(inspection)
    ignored = {value for value in map(ignored_value, losses.values()) if value is not None}
    takes_mask = any("mask" in inspect.signature(loss.forward).parameters for loss in losses.values())
    findings = []
    several = {name: pair for name, pair in partial.items() if pair[0].shape[0] > 1}
    if not (takes_mask and several):  # one id per voxel has no room for a mask per class
        thin = {name: (thinned(label), annotated) for name, (label, annotated) in partial.items()}
        findings += unknown_as_background(thin, class_ids, ignored | unlabelled_ids(inspection))
    if several:
        label, annotated = next(iter(several.values()))
        channels = [channel_of(i, class_ids, len(label)) for i in class_ids if i not in annotated]
        target = torch.from_numpy(np.array(thinned(label, 20_000), np.float32))[None]
        for name, loss in losses.items():
            findings += gradient_where_unknown(name, loss, target, channels)
    return findings


def check_mixing(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R17: a mixing augmentation (``extra``: ``mix``) of samples with different classes."""
    partial = partial_cases(inspection)
    mix = inspection.extra.get("mix")
    mixing = [target for _, block in blocks(inspection.config) if "mix" in (target := block["_target_"]).lower()]
    if not partial or (mix is None and not mixing):
        return []
    if mix is None:
        raise CannotRun(f"the bundle names no mix, and trains with {mixing[0]}")
    everything = frozenset(foreground_names(inspection))
    return mixed_without_intersection(mix, everything, next(iter(partial.values()))[1])


RULES: tuple[Rule, ...] = (
    Rule("R17", "partial annotation", check_annotation, tasks=WITH_CLASSES),
    Rule("R17", "mixing and annotation", check_mixing, tasks=WITH_CLASSES),
)
