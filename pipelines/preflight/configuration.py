"""Lint of a bundle's configuration: an override that nobody reads is an error, by name, with the nearest valid key.

MONAI adds a misspelt override (``--max_epoch 5``) to the configuration and goes on without it. Every top-level key must
therefore be read by another item (``@key``) or be one of the ids that MONAI itself looks up; so must every key of a
plain block (``keys.py``); and what a block names in Python has to exist and to take its arguments (``components.py``).

``lint`` raises the first fault, before a run does anything. The rules find all of them (R24), and what cannot work
although every name is right: an adjustment of the logits on one side only (R26), early stopping in the warm-up (R37),
phases without a step and schedules of another length (R41).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.preflight.components import (
    REFERENCE,
    SEPARATOR,
    blocks,
    component_faults,
    expression_faults,
    items,
)
from pipelines.preflight.finding import CannotRun, Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.keys import (
    absent_parts,
    absent_references,
    bundle_files,
    disabled_references,
    duplicate_keys,
    metrics_nobody_computes,
    part_of,
    referenced_keys,
    refuse_absent_references,
    refuse_unknown_overrides,
    unread_keys,
    unread_nested_keys,
    yaml_words,
)
from pipelines.preflight.rule import Rule
from transforms.errors import BundleError, FiducialError

__all__ = ["RULES", "faults", "lint", "referenced_keys", "refuse_absent_references", "refuse_unknown_overrides"]


def faults(config: Mapping[str, Any], files: Sequence[str | Path] | None = None) -> Iterator[FiducialError]:
    """Yield every fault of a configuration, the plainest first.

    Args:
        config: macros and overrides resolved.
        files: whose keys must stand once; None = those of the bundle, whose root is the working directory.
    """
    yield from absent_references(config)
    yield from unread_keys(config)
    yield from absent_parts(config)
    yield from unread_nested_keys(config)
    yield from yaml_words(config)
    yield from duplicate_keys(bundle_files(config) if files is None else files)
    yield from component_faults(config)
    yield from expression_faults(config)
    yield from disabled_references(config)
    yield from metrics_nobody_computes(config)


def lint(config: Mapping[str, Any], files: Sequence[str | Path] | None = None) -> None:
    """Raise the first fault of a configuration with its macros resolved; arguments as in ``faults``.

    Raises:
        UsageError: a key that nobody reads, or a text that means a value (exit code 2: most often a misspelt option).
        BundleError: a reference, component, argument, function or metric that is not there; a key that stands twice.
    """
    for fault in faults(config, files):
        raise fault


# --- what a configuration gets wrong although every name in it is right

# kind of adjustment -> names of arguments, components and hyper-parameters that make it
_ADJUSTMENTS = {
    "temperature": re.compile(r"temperature", re.IGNORECASE),
    "prior": re.compile(r"(^|_)(log_)?priors?$|^tau$|balanced_?softmax|class_frequenc", re.IGNORECASE),
    "logit shift": re.compile(r"logit_?(shift|bias|offset|adjust)", re.IGNORECASE),
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {"temperature": (None, False, "", 1), "prior": (None, False, "", 0)}
# component -> the argument that says how long it lasts
_SCHEDULERS = {
    "OneCycleLR": "total_steps",
    "CosineAnnealingLR": "T_max",
    "PolynomialLR": "total_iters",
    "WarmupCosineSchedule": "t_total",
}


@dataclass(frozen=True)
class EarlyStop:
    """Something that ends a training early: it judges from epoch ``active_from`` on, after ``patience`` epochs."""

    name: str
    active_from: int
    patience: int
    warmup_epochs: int
    max_epochs: int
    validation_interval: int = 1


def adjustments_of(part: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return kind of adjustment -> its value, of all in a part of a configuration; what does nothing is left out."""
    found: dict[str, Any] = {}
    for at, value in items(part):
        names = [at.rsplit("::", 1)[-1]]
        if isinstance(value, str):
            path = SEPARATOR.split(value[1:]) if REFERENCE.fullmatch(value) else []
            names += path if path else [value] if re.fullmatch(r"[\w.]+", value) else []
            value = part_of(config, path) if path else value
        for kind, pattern in _ADJUSTMENTS.items():
            if any(pattern.search(name.rsplit(".", 1)[-1]) for name in names) and not isinstance(value, Mapping):
                neutral = _NEUTRAL.get(kind, (None, False, "", 0))
                if value not in neutral and value != []:
                    found[kind] = value
    return found


def one_sided_adjustments(training: Mapping[str, Any], inference: Mapping[str, Any]) -> list[Finding]:
    """Find adjustments of the logits that only the loss or only the inference makes, or both with different values."""
    findings = []
    for kind in sorted({*training, *inference}):
        ours, theirs = training.get(kind, "none"), inference.get(kind, "none")
        if ours != theirs:
            findings.append(
                Finding(
                    rule="R26",
                    severity="error",
                    what=f"the logits that the loss sees and those of inference differ by a {kind}",
                    measured=f"training: {ours}; inference: {theirs}",
                    threshold="the same on both sides",
                    cause=f"the {kind} was added on one side alone",
                    fix=f"take the {kind} out, or put it into the network, which both sides share",
                    evidence={"kind": kind},
                )
            )
    return findings


def early_stopping_too_early(stop: EarlyStop, limits: Mapping[str, float]) -> list[Finding]:
    """Find an early stop that judges while the network warms up, or that gives up between two looks."""
    findings = []
    expected = max(stop.warmup_epochs, limits["share"] * stop.max_epochs)
    if stop.active_from < expected:
        findings.append(
            Finding(
                rule="R37",
                severity="error",
                what=f"{stop.name} may end the training before it has begun to learn",
                measured=f"it counts from epoch {stop.active_from} on, patience {stop.patience}",
                threshold=f"from epoch {expected:g} on (warm-up, or {limits['share']:.0%} of {stop.max_epochs})",
                cause="an early stop that knows nothing of the warm-up",
                fix="use early_stopping_patience, which waits, and take this handler out",
            )
        )
    if stop.patience < limits["looks"] * stop.validation_interval:
        findings.append(
            Finding(
                rule="R37",
                severity="warn",
                what=f"{stop.name}: the patience covers hardly a validation",
                measured=f"patience {stop.patience} epochs, a validation every {stop.validation_interval}",
                threshold=f"{limits['looks']:g} validations or more",
                cause="one validation without improvement ends the run",
                fix="raise early_stopping_patience, or validate more often",
            )
        )
    return findings


def wrong_schedule_length(name: str, steps: int, batches: int, accumulation: int, epochs: int) -> list[Finding]:
    """Find a schedule that does not last as long as the training: ceil(batches / accumulation) x epochs steps."""
    expected = -(-batches // accumulation) * epochs
    if steps == expected:
        return []
    return [
        Finding(
            rule="R41",
            severity="error",
            what=f"{name}: the learning rate's schedule is not as long as the training",
            measured=f"{steps} steps",
            threshold=f"{expected} steps (ceil({batches} batches / {accumulation} accumulated) x {epochs} epochs)",
            cause="it was planned for other epochs, batches or accumulation, or for the other of steps and epochs",
            fix=f"plan it for {expected} steps",
        )
    ]


def idle_phases(requested: Sequence[str], planned: Mapping[str, int]) -> list[Finding]:
    """Find phases that were asked for and would take no step.

    Args:
        requested: names in the configuration.
        planned: name -> optimiser steps.
    """
    return [
        _phase_finding(
            name, f"{planned.get(name, 0)} optimiser steps", "1 or more", "it is not in the plan, or is empty"
        )
        for name in {*requested, *planned}
        if planned.get(name, 0) < 1
    ]


def wrong_rates(phase: str, wanted: Mapping[str, float], groups: Mapping[str, float]) -> list[Finding]:
    """Find groups of parameters whose learning rate is not the one of their phase.

    Args:
        phase: its name.
        wanted: group -> rate of the phase.
        groups: group -> rate of the optimiser.
    """
    wrong = {name: groups.get(name) for name, rate in wanted.items() if groups.get(name) != rate}
    extra = {name: rate for name, rate in groups.items() if name not in wanted}
    if not wrong and not extra:
        return []
    measured = f"rates {dict(wrong) | extra}"
    return [_phase_finding(phase, measured, f"rates {dict(wanted)}", "a group has inherited the rate of another")]


def _phase_finding(phase: str, measured: str, threshold: str, cause: str) -> Finding:
    return Finding(
        rule="R41",
        severity="error",
        what=f"phase {phase} would not train as it was asked to",
        measured=measured,
        threshold=threshold,
        cause=cause,
        fix="correct `phases` or `optimizer`",
    )


def check_configuration(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R24: every fault of the lint; from the bundle's root, where its files are."""
    config = inspection.need("config")
    files = bundle_files(config)
    findings = [
        Finding(
            rule="R24",
            severity="error",
            what=fault.what,
            measured=fault.why,
            threshold="every name known, every key read, once",
            cause="a misspelt or outdated name",
            fix=fault.fix,
        )
        for fault in faults(config, files)
    ]
    if not files and not findings:
        raise CannotRun("there is no configs/ here, so nobody has looked for keys that stand twice")
    return findings


def check_adjustments(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R26: the loss and the training's chain against validation and ``configs/inference.yaml``."""
    config = inspection.need("config")
    validate = config.get("validate", {})
    training = [config.get("loss"), config.get("train"), [phase.loss for phase in inspection.plan]]
    inference = [validate.get("inferer"), validate.get("postprocessing")]
    findings = one_sided_adjustments(
        adjustments_of(training, config), adjustments_of(_expanded(inference, config), config)
    )
    deployed = _inference_configuration()
    if deployed is not None and not findings:
        parts = [deployed.get("inferer"), deployed.get("postprocessing")]
        findings = one_sided_adjustments(
            adjustments_of(training, config), adjustments_of(_expanded(parts, deployed), deployed)
        )
    return findings


def _expanded(part: Any, config: Mapping[str, Any], depth: int = 8) -> Any:
    """Return a part of a configuration with the blocks in it that stand elsewhere."""
    if isinstance(part, str) and REFERENCE.fullmatch(part) and depth:
        found = part_of(config, SEPARATOR.split(part[1:]))
        return _expanded(found, config, depth - 1) if isinstance(found, (Mapping, list)) else part
    if isinstance(part, Mapping):
        return {key: _expanded(value, config, depth) for key, value in part.items()}
    return [_expanded(value, config, depth) for value in part] if isinstance(part, (list, tuple)) else part


def _inference_configuration() -> Mapping[str, Any] | None:
    """Return ``configs/inference.yaml`` of the bundle whose root is the working directory, if it is there."""
    from monai.bundle import ConfigParser

    path = Path("configs/inference.yaml")
    if not path.is_file():
        return None
    parser = ConfigParser()
    parser.read_config(str(path))
    parser.resolve_macro_and_relative_ids()
    return dict(parser.get())


def check_early_stopping(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R37, as far as the configuration tells: the phases' own patience, and handlers that stop on their own."""
    config, plan = inspection.need("config"), inspection.need("plan")
    interval = _number(config.get("val_interval"), config) or 1
    warmup, epochs = max(p.warmup_epochs for p in plan), min(p.max_epochs for p in plan)
    stops = [  # as phase_engine sets them up
        EarlyStop(
            f"phase {p.name}",
            max(p.warmup_epochs, -(-p.max_epochs // 4)),
            p.patience,
            p.warmup_epochs,
            p.max_epochs,
            int(interval),
        )
        for p in plan
        if p.patience
    ]
    for at, block in blocks(config):
        if block["_target_"].rsplit(".", 1)[-1] in ("EarlyStopHandler", "EarlyStopping"):
            patience = int(_number(block.get("patience"), config) or 0)
            name = f"{at} ({block['_target_']})"
            stops.append(EarlyStop(name, 0, patience * int(interval), warmup, epochs, int(interval)))
    return [finding for stop in stops for finding in early_stopping_too_early(stop, limits)]


def check_schedule(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R41, as far as the configuration tells: phases without a step, rates, and schedules of another length."""
    config, plan = inspection.need("config"), inspection.need("plan")
    given = config.get("phases")
    asked = [str(phase.get("name")) for phase in given if isinstance(phase, Mapping)] if isinstance(given, list) else []
    findings = idle_phases(asked, {p.name: p.optimizer_steps_per_epoch * p.max_epochs for p in plan})
    for phase in plan:
        if phase.warmup_epochs >= phase.max_epochs:
            measured = f"{phase.warmup_epochs} epochs of warm-up"
            findings.append(
                _phase_finding(phase.name, measured, f"less than its {phase.max_epochs} epochs", "a short run")
            )
        findings += _rate_findings(inspection.need("network"), phase)
    if isinstance(config.get("optimizer"), Mapping) and "lr" in config["optimizer"]:
        measured, cause = (
            f"optimizer: lr {config['optimizer']['lr']}",
            "rates are those of the phases; nobody reads this",
        )
        findings.append(_phase_finding(plan[0].name, measured, f"rates {dict(plan[0].rates)} alone", cause))
    for at, block in blocks(config):
        argument = _SCHEDULERS.get(block["_target_"].rsplit(".", 1)[-1])
        length = _number(block.get(argument), config) if argument else None
        if length is not None:
            phase = plan[-1]
            batches = 1 if _steps_by_epoch(at, config) else phase.steps_per_epoch
            accumulation = 1 if _steps_by_epoch(at, config) else phase.accumulation_steps
            findings += wrong_schedule_length(at, int(length), batches, accumulation, phase.max_epochs)
    return findings


def _rate_findings(network: Any, phase: Any) -> list[Finding]:
    """Find parameters that have no rate or two; what learns is left as it was."""
    from pipelines.training.phases import parameter_groups

    learning = [parameter.requires_grad for parameter in network.parameters()]
    try:
        groups = parameter_groups(network, phase)
        return wrong_rates(phase.name, phase.rates, {group["name"]: group["lr"] for group in groups})
    except BundleError as fault:
        return [_phase_finding(phase.name, f"{fault.what}; {fault.why}", "one rate for what learns", "its expressions")]
    finally:
        for parameter, before in zip(network.parameters(), learning, strict=True):
            parameter.requires_grad_(before)


def _steps_by_epoch(at: str, config: Mapping[str, Any]) -> bool:
    """Return whether the schedule at ``at`` is inside of a handler that moves it once per epoch (MONAI's default)."""
    path = at.split("::")
    for count in range(len(path) - 1, 0, -1):
        owner = part_of(config, path[:count])
        if isinstance(owner, Mapping) and str(owner.get("_target_", "")).endswith("LrScheduleHandler"):
            return bool(owner.get("epoch_level", True))
    return False


def _number(value: Any, config: Mapping[str, Any]) -> float | None:
    """Return a plain number, or the one that ``@key`` refers to; None where only the run can tell."""
    if isinstance(value, str) and REFERENCE.fullmatch(value):
        value = part_of(config, SEPARATOR.split(value[1:]))
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


RULES: tuple[Rule, ...] = (
    Rule("R24", "configuration", check_configuration),
    Rule("R26", "logits of training and inference", check_adjustments),
    Rule("R37", "early stopping", check_early_stopping, {"share": 0.25, "looks": 2.0}),
    Rule("R41", "phases and schedule", check_schedule),
)
