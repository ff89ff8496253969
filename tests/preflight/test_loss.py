"""Rules about losses: gradients by hand, edges, weights of classes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from planted import Proof
from proof_loss import PROOFS, RULES, ClampedBCE, DividesByWeight, with_terms
from proof_network import found, fusion, lesion
from torch import nn

from pipelines.losses import CompositeLoss, FusionLoss, cross_entropy_loss, segmentation_loss, supervised_loss
from pipelines.losses.composite import SEGMENTATION_LOSSES
from pipelines.preflight import CannotRun
from pipelines.preflight.loss import (
    Edge,
    judge_class_weights,
    judge_edges,
    judge_gradients,
    judge_ignored,
    segmentation_edges,
    term_gradients,
)

LIMITS = {rule.id: rule.limits for rule in RULES}


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_planted_failure_is_found(proof: Proof) -> None:
    findings = proof.planted()
    assert findings
    assert {finding.rule for finding in findings} == {proof.rule}
    assert findings[0].severity == proof.severity


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_healthy_run_is_quiet(proof: Proof) -> None:
    assert list(proof.healthy()) == []


def test_gradient_by_hand() -> None:
    # Two voxels, logits 0: p = 1/2 for both classes. d CE / d logit = (p - y) / 2 voxels: four entries of 1/4.
    # Squared and added 4/16, the norm is 1/2; the weight of 3 makes it 3/2.
    loss = CompositeLoss({"ce": (3.0, cross_entropy_loss)})
    norms = term_gradients(loss, torch.zeros(1, 2, 1, 2), torch.tensor([[[[0, 1]]]]))
    assert norms == {"ce": pytest.approx(1.5)}


def test_of_a_fusion_the_loss_measures_itself() -> None:
    label = torch.rand(1, 7, 16, 16, generator=torch.Generator().manual_seed(0))
    label[:, 3:6] = 1
    loss = FusionLoss(1.0, 2.0, 0.0)
    norms = term_gradients(loss, torch.zeros(1, 1, 16, 16), label)
    assert set(norms) == {"diffusion", "brain", "bone"}
    assert loss.last_terms == {}  # the run's own loss has seen nothing
    # d/dx of mean w (x - x0)^2 at x = 0 is -2 w x0 / n
    assert norms["diffusion"] == pytest.approx(float((2 * label[:, 6] * label[:, 0] / 256).norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("norms", "severities"),
    [
        ({"a": 1.0, "b": 0.01}, []),
        ({"a": 1.0, "b": 0.0099}, ["warn"]),
        ({"a": 1.0, "b": 9e-9}, ["error"]),
        ({"a": 1.0, "b": float("nan")}, ["error"]),
        ({"a": 1e-8}, []),
    ],
)
def test_gradients_at_their_limits(norms: dict[str, float], severities: list[str]) -> None:
    assert [finding.severity for finding in judge_gradients(norms, LIMITS["R18"])] == severities


def test_a_term_whose_region_is_not_in_the_batch_is_not_called_dead() -> None:
    class NoBone(torch.utils.data.Dataset):
        def __getitem__(self, index: int) -> dict[str, object]:
            sample = dict(fusion().train[index])
            label = torch.as_tensor(sample["label"]).clone()
            label[4] = 0
            return {**sample, "label": label}

    assert found(RULES, "R18", replace(fusion(), train=NoBone())) == []


def test_voxels_that_do_not_count() -> None:
    assert judge_ignored(1.0, 1.0 + 9e-5, LIMITS["R18"]) == []
    assert judge_ignored(1.0, 1.0 + 2e-4, LIMITS["R18"])

    class OverAll(nn.Module):
        """Divides by all voxels, counted or not."""

        ignore_index = 255

        def __init__(self) -> None:
            super().__init__()
            self.weighted_terms = {"ce": (1.0, None)}

        def terms(self, logits: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
            wrong = nn.functional.cross_entropy(logits, target[:, 0].long(), ignore_index=255, reduction="sum")
            return {"ce": wrong / target.numel()}

        def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return self.terms(logits if logits.ndim == target.ndim else logits[:, 0], target)["ce"]

    (finding,) = found(RULES, "R18", replace(lesion(), loss=lambda name: OverAll()))
    assert "do not count" in finding.what


def test_a_loss_that_does_not_tell_its_terms_is_not_judged() -> None:
    with pytest.raises(CannotRun, match="CrossEntropyLoss"):
        term_gradients(nn.CrossEntropyLoss(), torch.zeros(1, 2, 4), torch.zeros(1, 1, 4))


@pytest.mark.parametrize("name", SEGMENTATION_LOSSES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_loss_of_the_project_is_finite_at_every_edge(name: str, precision: str) -> None:
    edges = segmentation_edges(supervised_loss(name), 2, 3, precision)
    assert judge_edges(edges, precision) == []
    assert {edge.outcome for edge in edges} == {"finite", "refused"}  # refused: the NaN in the target
    ignoring = segmentation_edges(segmentation_loss(name, ignore_index=255), 3, 2, precision)
    assert judge_edges(ignoring, precision) == []
    assert "all voxels ignored" in [edge.name for edge in ignoring]


def test_the_clamp_breaks_in_half_precision_only() -> None:
    assert judge_edges([e for e in segmentation_edges(ClampedBCE(), 2, 3, "fp32") if e.name != "NaN target"], "") == []
    (finding,) = judge_edges(segmentation_edges(ClampedBCE(), 2, 3, "bf16"), "bf16")
    assert "bf16" in finding.measured


def test_a_region_that_is_empty() -> None:
    findings = found(RULES, "R19", replace(fusion(), loss=lambda name: DividesByWeight(1.0, 1.0, 0.0)))
    assert "empty regions" in findings[0].what


def test_a_nan_that_disappears_is_found() -> None:
    edges = [Edge("p = 0", "finite"), Edge("NaN target", "finite")]
    (finding,) = judge_edges(edges, "fp32")
    assert "disappears" in finding.what
    assert judge_edges([Edge("NaN target", "refused")], "fp32") == []
    assert judge_edges([Edge("NaN target", "not finite")], "fp32") == []
    assert judge_edges([Edge("an empty label", "refused")], "fp32")


@pytest.mark.parametrize(
    ("weights", "scheme", "mechanisms", "severities"),
    [
        ([1.0, 50.0], "", [], []),
        ([1.0, 50.1], "", [], ["warn"]),
        ([0.0, 1.0], "", [], ["warn"]),  # a class that counts nothing
        ([1.0, 1.02], "inverse", [], []),
        ([1.0, 1.005], "inverse", [], ["error"]),
        ([], "inverse", [], ["error"]),
        ([], "", [], []),
        ([1.0, 2.0], "", ["focal alpha", "class_weights"], ["warn"]),
    ],
)
def test_class_weights_at_their_limits(
    weights: list[float], scheme: str, mechanisms: list[str], severities: list[str]
) -> None:
    findings = judge_class_weights(weights, LIMITS["R27"], scheme, mechanisms)
    assert [finding.severity for finding in findings] == severities


def test_weights_are_found_in_torchs_own_losses() -> None:
    class Torch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.CrossEntropyLoss(weight=torch.tensor([0.05, 0.5, 5.0, 8.0]))

    (finding,) = found(RULES, "R27", replace(lesion(), loss=lambda name: Torch()))
    assert "160" in finding.measured  # 8 / 0.05


def test_a_dead_term_is_named() -> None:
    (proof, *_) = PROOFS
    assert "the term dice" in proof.planted()[0].what
    assert found(RULES, "R18", with_terms(ce=(1.0, cross_entropy_loss))) == []
