"""Rules about networks: shapes by hand, a batch learnt by heart, a condition that reaches the output."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from planted import Proof
from proof_network import PROOFS, RULES, FourPoolings, found, fusion, fusion_with, lesion, lesion_with, with_network
from torch import nn

from pipelines.inference import SamplingInferer
from pipelines.losses import supervised_loss
from pipelines.networks import segmentation_network
from pipelines.preflight import CannotRun, Inspection
from pipelines.preflight.condition import Responses, check_condition, judge_responses, responses, wake
from pipelines.preflight.network import judge_head_weights, judge_outputs, judge_resolution
from pipelines.preflight.samples import crop_to, draw_batch
from pipelines.preflight.steps import Learnt, check_learnt, check_steps, judge_learnt, judge_steps
from pipelines.preflight.tracing import Trace, smallest_size, trace
from pipelines.training.phases import Phase
from transforms.diffusion import NoiseSchedule

LIMITS = {rule.name: rule.limits for rule in RULES}
LEARNT = LIMITS["one batch is learnt"]


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_planted_failure_is_found(proof: Proof) -> None:
    findings = proof.planted()
    assert findings
    assert {finding.rule for finding in findings} == {proof.rule}
    assert findings[0].severity == proof.severity


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_healthy_run_is_quiet(proof: Proof) -> None:
    assert list(proof.healthy()) == []


@pytest.mark.parametrize(
    "changes",
    [{"schedule": "none"}, {"prediction": "v"}, {"dimensions": 2.5, "stack_slices": 3, "patch_size": [48, 56, 4]}],
    ids=["one pass", "v", "2.5D"],
)
def test_other_kinds_of_fusion_are_quiet(changes: dict[str, object]) -> None:
    run = fusion_with(**changes)
    assert [finding for rule in ("R21", "R22", "R25") for finding in found(RULES, rule, run)] == []


def test_a_network_of_slices_is_quiet() -> None:
    run = lesion_with(dimensions=2.5, patch_size=[32, 32, 4])
    assert found(RULES, "R21", run) + found(RULES, "R25", run) == []


def test_nothing_of_the_run_is_touched() -> None:
    run = fusion()
    weights = {name: tensor.clone() for name, tensor in run.network.state_dict().items()}
    training, epoch, gradients = run.network.training, run.train.epoch, [p.grad for p in run.network.parameters()]
    generator, sample = torch.get_rng_state(), run.train[3]["image"]
    for rule in RULES:
        rule.check(run, rule.limits)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in run.network.state_dict().items())
    assert (run.network.training, run.train.epoch) == (training, epoch)
    assert [p.grad for p in run.network.parameters()] == gradients
    assert torch.equal(torch.as_tensor(run.train[3]["image"]), torch.as_tensor(sample))


# Four halvings of 26 slices leave 13, 6, 3 and 1; doubled again 2, 4, 8, 16. The skips of 3, 6, 13 and 26 slices are
# cut by 1, 2, 5 and 10 before the join: three of these lose more than a voxel. In plane 32 divides, nothing is cut.
def test_crops_by_hand() -> None:
    seen = trace(FourPoolings(1), (1, 1, 32, 32, 26))
    assert sorted(crop.voxels for crop in seen.crops) == [1, 2, 5, 10]
    assert {crop.axis for crop in seen.crops} == {2}
    assert {(thin.axis, thin.size, thin.kernel) for thin in seen.thin} == {(2, 1, 3)}
    assert seen.outputs == {"": (1, 1, 32, 32, 16)}
    assert len(judge_resolution(seen, {"crop_voxels": 1})) == 3


def test_a_crop_of_one_voxel_is_allowed() -> None:
    # 6 -> 3 -> 1 -> 2 -> 4 would be more; 9 -> 4 -> 8 loses one voxel and the output a plane
    class OnePooling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            small = nn.functional.interpolate(nn.functional.max_pool3d(x, 2), scale_factor=2)
            return torch.cat([small, x[..., : small.shape[-1]]], 1)

    seen = trace(OnePooling(), (1, 1, 8, 8, 9))
    assert [crop.voxels for crop in seen.crops] == [1]
    assert len(judge_resolution(seen, {"crop_voxels": 1})) == 1  # the output alone
    assert len(judge_resolution(seen, {"crop_voxels": 0})) == 2


def test_an_axis_of_one_voxel_is_no_defect_and_a_global_pool_neither() -> None:
    class SqueezeExcite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return x * torch.sigmoid(self.gate(x.mean((2, 3, 4), keepdim=True)))

    assert judge_resolution(trace(SqueezeExcite(), (1, 1, 8, 8, 1)), {"crop_voxels": 1}) == []
    assert trace(SqueezeExcite(), (1, 1, 8, 8, 8)).thin == ()


def test_tracing_computes_nothing_and_copies_no_values() -> None:
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 2, 1))
    seen = trace(network, (4, 1, 2048, 2048, 2048))  # 137 GB, if anything were computed
    assert seen.outputs == {"": (4, 2, 2048, 2048, 2048)}
    assert next(network.parameters()).device.type == "cpu"


def test_a_network_that_looks_at_values_is_run() -> None:
    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) == 0 else x[..., ::2]

    assert trace(Looks(), (1, 1, 8, 8)).outputs == {"": (1, 1, 8, 8)}


def test_heads_keep_their_resolution_in_mind() -> None:
    network = segmentation_network(3, 1, 2, [1.0] * 3, [64, 64, 64], [4, 4, 4, 4, 4])
    seen = trace(network, (1, 1, 64, 64, 64), training=True)
    assert seen.heads == ((64, 64, 64), (32, 32, 32), (16, 16, 16))
    assert seen.outputs == {"": (1, 3, 2, 64, 64, 64)}
    assert smallest_size(network, (1, 1, 64, 64, 64)) == (32, 32, 32)  # 16 would leave one voxel after four halvings


def test_a_loss_that_reads_the_output_with_a_network_keeps_the_crop_as_large_as_that_needs() -> None:
    own = nn.Conv3d(2, 1, 3, padding=1)  # takes any size
    reader = segmentation_network(3, 1, 2, [1.0] * 3, [64, 64, 64], [4, 4, 4, 4, 4])  # 32, as above
    assert smallest_size(own, (1, 2, 64, 64, 64)) == (16, 16, 16)
    assert smallest_size(own, (1, 2, 64, 64, 64), reader=reader) == (32, 32, 32)


def test_weights_of_heads() -> None:
    sizes = [(32, 32), (16, 16), (8, 8)]
    assert judge_head_weights(sizes, [4 / 7, 2 / 7, 1 / 7]) == []
    assert judge_head_weights(sizes, [1 / 3, 1 / 3, 1 / 3]) == []
    (reversed_,) = judge_head_weights(sizes, [0.067, 0.267, 0.533])
    assert reversed_.rule == "R25"
    # the coarsest head comes first: now the same weights are right
    assert judge_head_weights(sizes[::-1], [0.067, 0.267, 0.533]) == []


def test_reversed_weights_in_the_bundle_are_found() -> None:
    class CoarsestFirst(nn.Module):
        def __init__(self, loss: nn.Module) -> None:
            super().__init__()
            self.loss = loss

        def head_weights(self, heads: int) -> list[float]:
            return self.loss.head_weights(heads)[::-1]

    run = replace(lesion(), loss=lambda name: CoarsestFirst(supervised_loss(name)))
    (finding,) = found(RULES, "R25", run)
    assert "counts more" in finding.what


def test_outputs_in_eval_mode() -> None:
    def outputs(**shapes: tuple[int, ...]) -> Trace:
        return Trace((1, 2, 8, 8), shapes)

    assert judge_outputs(Trace((1, 2, 8, 8), {"": (1, 3, 8, 8)}), 3) == []
    assert judge_outputs(Trace((1, 2, 8, 8), {"": (1, 3, 8, 8)}), 2)
    assert judge_outputs(outputs(a=(1, 3, 8, 8), b=(1, 3, 4, 4)))
    assert judge_outputs(Trace((1, 2, 8, 8), {"": (1, 2, 3, 8, 8)}))


def test_a_sampler_that_changes_the_grid_is_found() -> None:
    class Halves(SamplingInferer):
        def __call__(self, inputs: torch.Tensor, network: object, *args: object, **kwargs: object) -> torch.Tensor:
            return inputs[:, :1, ::2]

    run = fusion()
    (finding,) = found(RULES, "R25", replace(run, inferer=Halves(run.inferer.inferer, 5)))
    assert "inferer" in finding.what


@pytest.mark.parametrize(
    ("learnt", "quiet"),
    [
        (Learnt(1.0, 0.2, 200), True),
        (Learnt(1.0, 0.21, 200), False),
        (Learnt(1.0, 0.9, 200, dice=0.9), True),
        (Learnt(1.0, 0.9, 200, dice=0.89), False),
        (Learnt(1.0, 0.9, 200, mse_ratio=0.19), True),
        (Learnt(1.0, 0.9, 200, mse_ratio=0.2), False),
        (Learnt(1e-8, 2e-8, 1, mse_ratio=2.0, mse=9e-5), True),  # a clean pair: there was nothing to learn
        (Learnt(1e-8, 2e-8, 1, mse_ratio=2.0, mse=1e-4), False),
        (Learnt(1.0, float("nan"), 3), False),
    ],
)
def test_learnt_by_heart_or_not(learnt: Learnt, quiet: bool) -> None:
    assert (judge_learnt(learnt, LEARNT) == []) == quiet


def test_a_dead_output_cannot_learn() -> None:
    class Dead(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = copy.deepcopy(network)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0 * self.network(x)

    run = with_network(lesion(), Dead(lesion().network))
    (finding,) = check_learnt(run, {**LEARNT, "steps": 5})
    assert "by heart" in finding.what
    assert "0 %" in finding.measured


def test_a_step_that_breaks_is_named() -> None:
    (finding,) = judge_steps({"training": "", "validation": "ValueError: shapes"})
    assert "validation" in finding.what
    assert finding.measured == "ValueError: shapes"


def test_a_metric_that_does_not_fit_is_named() -> None:
    class Refuses:
        def reset(self) -> None: ...

        def update(self, items: object) -> None:
            raise ValueError("no key 'prediction'")

    run = replace(lesion(), metrics={"dice": Refuses()})
    assert [finding.what for finding in check_steps(run, {})] == ["one step of validation does not run"]


@pytest.mark.parametrize(
    ("seen", "number"),
    [
        (Responses(0.01, 0.01, 1e-6), 0),
        (Responses(0.009, 0.01, 1e-6), 1),
        (Responses(0.01, 0.009, None), 1),
        (Responses(0.0, 0.0, 0.0), 3),
    ],
)
def test_responses_at_their_limits(seen: Responses, number: int) -> None:
    assert len(judge_responses(seen, {"change": 0.01})) == number


def test_a_first_guess_does_not_stand_in_for_the_network() -> None:
    """An output layer at zero returns the guess: woken, what the layer carries is measured without the guess."""

    class Guesses(nn.Module):
        def __init__(self, sees: int) -> None:
            super().__init__()
            self.sees, self.head = sees, nn.Conv2d(2, 1, 1)
            nn.init.zeros_(self.head.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :1] + self.head(x[:, self.sees : self.sees + 2])

    draw = torch.Generator().manual_seed(0)
    condition, other = torch.randn(2, 2, 32, 32, generator=draw).split(1)
    # channels: condition 0 and 1, x_t 2, t 3; the second network never looks at the condition
    alive = responses(Guesses(1), condition, other, NoiseSchedule("cosine"))
    blind = responses(Guesses(2), condition, other, NoiseSchedule("cosine"))
    assert min(alive.swapped, alive.shifted) > 0.1
    assert (blind.swapped, blind.shifted) == pytest.approx((0, 0), abs=1e-5)
    assert blind.noise is not None
    assert blind.noise > 0.1
    assert responses(Guesses(1), condition, other, NoiseSchedule("none")).noise is None


def test_only_layers_at_zero_are_woken() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 1))
    before = copy.deepcopy(network)
    assert wake(network).untouched
    nn.init.zeros_(network[1].weight)
    awake = wake(network)
    assert not awake.untouched
    assert bool(awake.network[1].weight.all())
    assert torch.equal(awake.network[0].weight, before[0].weight)
    assert not network[1].weight.any()


def test_the_crop_is_where_there_is_most_to_learn() -> None:
    # of 8 x 8, crops of 4 x 4 that start at multiples of 2: the weights at (6, 1) and (7, 2) are both in rows 4 to 7
    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    weight = torch.zeros(1, 1, 8, 8)
    weight[0, 0, 6, 1] = weight[0, 0, 7, 2] = 1
    cropped, label = crop_to(image, image, (4, 4), weight)
    assert torch.equal(cropped, image[:, :, 4:, :4])
    assert torch.equal(label, cropped)
    assert torch.equal(crop_to(image, image, (4, 4))[0], image[:, :, 2:6, 2:6])


def test_foreground_comes_first() -> None:
    class Mostly(torch.utils.data.Dataset):
        def __getitem__(self, index: int) -> dict[str, object]:
            label = torch.full((1, 4, 4), int(index in (5, 9)))
            return {"image": torch.full((1, 4, 4), float(index)), "label": label, "case": str(index)}

    image, label = draw_batch(Inspection("segmentation", train=Mostly()), 3)
    assert image[:, 0, 0, 0].tolist() == [5, 9, 0]
    assert label.flatten(1).any(1).tolist() == [True, True, False]


def test_what_is_lacking_is_said() -> None:
    with pytest.raises(CannotRun, match="network"):
        found(RULES, "R21", Inspection("segmentation"))
    with pytest.raises(CannotRun, match="condition"):
        check_condition(replace(fusion(), inferer=lambda image, network: network(image)), {"change": 0.01})


def test_frozen_parameters_stay_frozen_while_a_batch_is_learnt() -> None:
    plan = [Phase("head", {"output_block": 0.01}, 1, 1, 1, "dice_ce")]
    run = replace(lesion(), plan=plan, validation=None)
    check_learnt(run, {**LEARNT, "steps": 2, "loss_fall": -10.0})
    assert all(parameter.requires_grad for parameter in run.network.parameters())
