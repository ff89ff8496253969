"""A kept step, run again: it names the data, the weights or the arithmetic, whichever was planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipelines.losses import DeepSupervisionLoss, segmentation_loss
from pipelines.training.replay import Replay, replay, save_batch
from transforms.errors import BundleError, UsageError

CONFIG = """
imports: ["$import torch", "$import types", "$from collections import OrderedDict"]
cohort: "$1 / 0"  # what must not be needed: the data may be elsewhere
contract: {channels: "$@cohort"}
loss_name: dice_ce
arithmetic: fp32
network_def: >-
  $torch.nn.Sequential(OrderedDict(
  first=torch.nn.Conv3d(@contract['channels'], 4, 1), norm=torch.nn.InstanceNorm3d(4, affine=True),
  second=torch.nn.Conv3d(4, 2, 1)))
plan: "$[types.SimpleNamespace(name='warm', loss='dice_focal'), types.SimpleNamespace(name='all', loss=@loss_name)]"
loss:
  _target_: pipelines.losses.segmentation_loss
  _mode_: callable
"""
HEADER = {"contract": {"channels": 2}, "precision": "fp32", "phase": "all", "run": "r1", "epoch": 3, "iteration": 41}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("first", nn.Conv3d(2, 4, 1))
    net.add_module("norm", nn.InstanceNorm3d(4, affine=True))
    net.add_module("second", nn.Conv3d(4, 2, 1))
    return net


def batch() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    label = (torch.rand(2, 1, 4, 4, 4, generator=draw) > 0.5).to(torch.uint8)
    return {"image": torch.randn(2, 2, 4, 4, 4, generator=draw), "label": label, "case": ["p7", "p9"]}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def kept(run_dir: Path, data: dict[str, Any], net: nn.Module, **header: Any) -> Path:
    path = run_dir / "batches" / "batch-0003-000000041-0.safetensors"
    save_batch(path, data, net, {**HEADER, **header})
    return path


def test_a_sound_step_is_repeated_to_the_bit(run_dir: Path) -> None:
    net, data = network(), batch()
    found = replay(kept(run_dir, data, net))
    loss = segmentation_loss("dice_ce")
    value = loss(net(data["image"]), data["label"])
    value.backward()
    (only,) = found.passes
    assert only.precision == "fp32"
    assert only.terms == {"loss": float(value), **{name: float(term) for name, term in loss.last_terms.items()}}
    norms = {name: float(parameter.grad.norm()) for name, parameter in net.named_parameters()}
    assert only.largest_gradient == max(norms.items(), key=lambda item: item[1])
    assert only.first_bad_module == ""
    assert found.verdict.startswith("not reproduced")


def test_the_loss_is_that_of_the_phase(run_dir: Path) -> None:
    assert set(replay(kept(run_dir, batch(), network(), phase="warm")).passes[0].terms) == {"loss", "dice", "focal"}
    with pytest.raises(BundleError, match="phase 'gone'"):
        replay(kept(run_dir, batch(), network(), phase="gone"))


def test_a_loss_that_is_made_once_is_taken_as_it_is(run_dir: Path) -> None:
    deep = 'loss: {_target_: pipelines.losses.DeepSupervisionLoss, loss: "$losses.segmentation_loss(@loss_name)"}'
    text = CONFIG[: CONFIG.index("loss:\n")].replace(
        '"$import types"', '"$import types", "$from pipelines import losses"'
    )
    (run_dir / "config.yaml").write_text(text + deep)
    found = replay(kept(run_dir, batch(), network()))
    loss = DeepSupervisionLoss(segmentation_loss("dice_ce"))
    assert found.passes[0].terms["loss"] == float(loss(network()(batch()["image"]), batch()["label"]))
    assert "main_head/dice" in found.passes[0].terms


def test_nan_in_the_image_is_named(run_dir: Path) -> None:
    data = batch()
    data["image"][1, 0, 2, 2, 2] = float("nan")
    found = replay(kept(run_dir, data, network(), figures={"loss": "nan", "dice": "nan"}))
    assert found.verdict == "the data are at fault: image of case p9, channel 0 has 1 values not finite"
    assert found.passes[0].first_bad_module == "first (Conv3d)"
    text = str(found)
    for words in ("epoch           3", "cases           p7, p9", "then            dice nan", "first (Conv3d)"):
        assert words in text
    (line,) = [line for line in found.inputs if line.startswith("image of case p9, channel 0")]
    finite = data["image"][1, 0].nan_to_num(0)
    assert line.endswith(f"{float(finite.min()):.4g} to {float(finite.max()):.4g}, 1 NaN, 0 infinite")


def test_infinite_weights_are_named(run_dir: Path) -> None:
    net = network()
    with torch.no_grad():
        net.get_parameter("second.weight")[0, 1] = float("inf")
    found = replay(kept(run_dir, batch(), net))
    assert found.bad_weights == ["second.weight (1 of 8)"]
    assert found.verdict == "the weights were not finite before this step: second.weight (1 of 8)"
    assert found.passes[0].first_bad_module == "second (Conv3d)"


def overflowing(run_dir: Path, precision: str) -> Replay:
    """300 * 300 is beyond the 65504 of half precision; the normalisation brings float32 back to size."""
    net, data = network(), batch()
    with torch.no_grad():
        net.get_parameter("first.weight").fill_(300.0)
    data["image"] *= 300
    return replay(kept(run_dir, data, net, precision=precision))


def test_an_overflow_of_half_precision_is_told_from_bad_data(run_dir: Path) -> None:
    found = overflowing(run_dir, "fp16")
    assert [each.precision for each in found.passes] == ["fp16", "fp32"]
    half, plain = found.passes
    assert half.first_bad_module == "first (Conv3d)"
    assert plain.first_bad_module == ""
    assert found.verdict.startswith("fp16 overflows, first in first (Conv3d); float32 does not")


def test_bf16_has_the_range_of_float32(run_dir: Path) -> None:
    found = overflowing(run_dir, "bf16")
    assert [each.precision for each in found.passes] == ["bf16", "fp32"]
    assert found.verdict.startswith("not reproduced")


def test_what_overflows_in_float32_is_not_blamed_on_the_arithmetic(run_dir: Path) -> None:
    data, net = batch(), network()
    data["image"] *= 1e30
    with torch.no_grad():
        net.get_parameter("first.weight").fill_(1e10)
    found = replay(kept(run_dir, data, net))
    assert found.verdict.startswith("not finite in float32 either, first in first (Conv3d)")


def test_the_precision_can_be_chosen_and_defaults_to_the_configuration(run_dir: Path) -> None:
    path = kept(run_dir, batch(), network(), precision="bf16")
    assert [each.precision for each in replay(path, "fp32").passes] == ["fp32"]
    header = {name: value for name, value in HEADER.items() if name != "precision"}
    save_batch(path, batch(), network(), header)
    assert [each.precision for each in replay(path).passes] == ["fp32"]
    with pytest.raises(UsageError, match="precision 'half'"):
        replay(path, "half")


def test_keeping_changes_nothing(run_dir: Path) -> None:
    net, data = network(), batch()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    kept(run_dir, data, net)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert set(data) == {"image", "label", "case"}
    assert [path.name for path in (run_dir / "batches").iterdir()] == ["batch-0003-000000041-0.safetensors"]


def test_files_that_cannot_be_replayed(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UsageError, match="no such file"):
        replay(run_dir / "batches" / "none.safetensors")
    path = kept(run_dir, batch(), network())
    elsewhere = tmp_path_factory.mktemp("elsewhere") / path.name
    elsewhere.write_bytes(path.read_bytes())
    with pytest.raises(BundleError, match=r"no config.yaml above it"):
        replay(elsewhere)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(BundleError, match="damaged"):
        replay(path)
    save_batch(path, {}, network(), HEADER)
    with pytest.raises(BundleError, match="no batch"):
        replay(path)
    save_batch(path, batch(), nn.Conv3d(2, 2, 1), HEADER)
    with pytest.raises(BundleError, match="another architecture"):
        replay(path)
