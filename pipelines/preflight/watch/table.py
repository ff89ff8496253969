"""Which rules watch a run, when, and with which limits. A user overrides ``<id>.<limit>`` as for every rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from pipelines.preflight.finding import CannotRun
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule, When

_CLASSES = ("segmentation", "organelles", "spectral", "instances")


def _before_the_run(inspection: Inspection, limits: Mapping[str, float]) -> NoReturn:
    raise CannotRun("it watches the run itself")


def _rule(rule: str, name: str, when: When, tasks: tuple[str, ...] | None = None, **limits: float) -> Rule:
    more: dict[str, Any] = {} if tasks is None else {"tasks": tasks}
    return Rule(rule, name, _before_the_run, limits, when, **more)


WATCHED: tuple[Rule, ...] = (
    _rule("R27", "a class without gradient", "training", _CLASSES, share=0.01, steps=100, learnt_dice=0.5),
    _rule("R30", "steps that are not finite", "training", share=0.01, scaler_share=0.05, least_steps=100),
    _rule(
        "R31", "collapse", "validation", _CLASSES,
        dominant=0.99, dominant_truth=0.95, rare_truth=0.001, rare_predicted=0.0001,
        signature=0.005, everywhere=0.9, validations=2, grace_share=0.25, grace_epochs=5,
    ),
    _rule("R32", "frozen metric", "validation", difference=1e-6, validations=2, long_validations=5),
    _rule("R33", "saturated output", "validation", ("fusion",), clamp=1e-4, share=0.001, spike=10),
    _rule(
        "R34", "not above trivial", "validation",
        grace_share=0.2, grace_epochs=5, psnr_db=0, psnr_epoch=1, ssim=0.05, ssim_epoch=10,
    ),
    _rule("R35", "not learning", "training", drop=0.05, epochs=5, noise_mse=0.95),
    _rule("R36", "overfitting", "validation", gap=0.15, validations=5, loss_rise=0.2),
    _rule("R37", "early stopping too early", "validation", passed=0.1, factor=2),
    _rule("R38", "best weights", "validation", difference=1e-6),
    _rule("R39", "one-sided errors", "validation", _CLASSES, high=0.8, low=0.3, validations=2),
    _rule("R40", "waiting for data", "training", share=0.5, least_seconds=30),
    _rule("R41", "learning rate and phase", "training", difference=1e-6),
    _rule("R42", "artefacts and curves", "export", epochs=2),
    _rule("R43", "validation samples change", "validation"),
    _rule(
        "R44", "instances against one another", "validation", ("instances",),
        rq_f1=0.05, fewest=0.8, most=1.25,
    ),
)  # fmt: skip

LIMITS: Mapping[str, Mapping[str, float]] = {rule.id: rule.limits for rule in WATCHED}
