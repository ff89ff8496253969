"""The rules that are asked before a training, family by family."""

from __future__ import annotations

from pipelines.preflight.rule import Rule

RULES: tuple[Rule, ...] = ()
