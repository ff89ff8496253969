"""Networks keep their output contract, can be copied in training, and learn; the stack is checked slice by slice."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets import DynUNet
from torch import nn

from pipelines.losses import DeepSupervisionLoss, segmentation_loss
from pipelines.networks import SliceStackNetwork, dynunet, segmentation_network
from transforms.errors import BundleError

ISOTROPIC = (1.0, 1.0, 1.0)


def small_network(dimensions: float, **options: object) -> nn.Module:
    return segmentation_network(
        dimensions, 1, 2, ISOTROPIC, (16, 16, 16), filters=[8, 16, 32], stack_slices=3, **options
    )


@pytest.mark.parametrize("dimensions", [3, 2.5])
def test_train_returns_heads_and_eval_returns_one_tensor(dimensions: float) -> None:
    network = small_network(dimensions)
    volume = torch.randn(2, 1, 16, 16, 16)
    assert network(volume).shape == (2, 2, 2, 16, 16, 16)  # main head and one auxiliary head
    assert network.eval()(volume).shape == (2, 2, 16, 16, 16)
    assert network.train()(volume).shape == (2, 2, 2, 16, 16, 16)


def test_first_head_is_the_output_of_eval_mode() -> None:
    network = small_network(3)  # instance norm: train and eval mode compute the same
    volume = torch.randn(1, 1, 16, 16, 16)
    torch.testing.assert_close(network(volume)[:, 0], network.eval()(volume))


def test_auxiliary_heads_are_not_computed_in_eval_mode() -> None:
    network = small_network(3)
    calls: list[bool] = []
    network.deep_supervision_heads[0].register_forward_hook(lambda *_: calls.append(network.training))
    volume = torch.randn(1, 1, 16, 16, 16)
    for mode in (True, False, True):
        network.train(mode)(volume)
    assert calls == [True, True]


def test_auxiliary_heads_follow_from_fine_to_coarse() -> None:
    network = segmentation_network(3, 1, 2, ISOTROPIC, (32, 32, 32), filters=[4, 8, 16, 32])
    heads = network(torch.randn(1, 1, 32, 32, 32)).unbind(1)
    assert len(heads) == 3
    # A head at 1/2^k resolution, resized by nearest neighbour, is constant on blocks of 2^k voxels.
    for level, head in enumerate(heads):
        block = 2**level
        blocks = head.unfold(2, block, block).unfold(3, block, block).unfold(4, block, block).flatten(5)
        assert bool((blocks.amax(-1) == blocks.amin(-1)).all())
    assert not torch.equal(heads[1][..., ::4], heads[1][..., 2::4])  # and the middle one is not as coarse as the last


@pytest.mark.parametrize("dimensions", [3, 2.5])
def test_copy_after_a_training_step(dimensions: float) -> None:
    network = small_network(dimensions)
    volume = torch.randn(1, 1, 16, 16, 16)
    network(volume).sum().backward()
    twin = copy.deepcopy(network)
    assert torch.equal(twin(volume), network(volume))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(twin(volume), network(volume))  # a copy, not a view


def test_monai_alone_cannot_be_copied_after_a_training_step() -> None:
    # Why PlannedDynUNet exists; when this fails, MONAI has been repaired.
    options = {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 8, 16]}
    network = DynUNet(3, 1, 2, **options, deep_supervision=True)
    network(torch.randn(1, 1, 16, 16, 16))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(network)


def test_network_can_be_exported_and_trained_on() -> None:
    network = small_network(3).eval()
    volume = torch.randn(1, 1, 16, 16, 16)
    exported = torch.export.export(network, (volume,)).module()
    torch.testing.assert_close(exported(volume), network(volume))
    assert torch.isfinite(network.train()(volume)).all()


@pytest.mark.parametrize("dimensions", [3, 2.5])
def test_fresh_builds_have_the_same_weights_by_name(dimensions: float) -> None:
    first, second = small_network(dimensions), small_network(dimensions)
    assert list(first.state_dict()) == list(second.state_dict())
    assert list(first.state_dict()) == list(copy.deepcopy(first).eval().state_dict())
    volume = torch.randn(1, 1, 16, 16, 16)
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(first.eval()(volume), second.eval()(volume))


@pytest.mark.parametrize("dimensions", [3, 2.5])
def test_every_parameter_gets_a_gradient(dimensions: float) -> None:
    network = small_network(dimensions)
    target = torch.zeros(1, 1, 16, 16, 16, dtype=torch.long)
    target[..., 4:9, 4:9, 4:9] = 1
    DeepSupervisionLoss(segmentation_loss("dice_ce"))(network(torch.randn(1, 1, 16, 16, 16)), target).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("dimensions", [3, 2.5])
def test_a_small_batch_is_learned(dimensions: float) -> None:
    torch.manual_seed(0)
    network = small_network(dimensions)
    grid = torch.stack(torch.meshgrid(*[torch.arange(16.0)] * 3, indexing="ij"))
    centres = torch.tensor([[7.0, 8.0, 6.0], [9.0, 6.0, 8.0]])
    target = torch.stack([((grid - c[:, None, None, None]).square().sum(0) < 20)[None] for c in centres]).long()
    volume = target + 0.7 * torch.randn(2, 1, 16, 16, 16)
    loss = DeepSupervisionLoss(segmentation_loss("dice_ce"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss(network(volume), target).backward()
        optimizer.step()
    predicted = network.eval()(volume).argmax(1, keepdim=True)
    dice = 2 * (predicted * target).sum() / (predicted.sum() + target.sum())
    assert dice > 0.9


@pytest.mark.parametrize(("residual", "norm"), [(True, "instance"), (False, "batch")])
def test_options_build(residual: bool, norm: str) -> None:
    network = dynunet(2, 3, (1, 1), (16, 32), filters=[4, 8, 16], residual=residual, norm=norm)
    assert network(torch.randn(2, 2, 16, 32)).shape == (2, 2, 3, 16, 32)
    kinds = {type(module) for module in network.modules()}
    assert (nn.BatchNorm2d in kinds) == (norm == "batch")
    assert nn.LeakyReLU in kinds


@pytest.mark.parametrize(("norm", "same"), [("instance", False), ("batch", True)])
def test_what_a_window_shows_far_away(norm: str, same: bool) -> None:
    """Air at one end of a window and the answer at the other, 40 voxels away: the convolutions see half as far.

    To one side, in voxels: 2 at full size, 3 at half, 6 at a quarter, and on the way up 4 at half and 2 at full size,
    with at most 3 for either transposed convolution.
    """
    torch.manual_seed(0)
    network = segmentation_network(3, 1, 2, ISOTROPIC, (64, 16, 16), filters=[4, 8, 16], norm=norm).eval()
    image = torch.randn(1, 1, 64, 16, 16)
    with_air = image.clone()
    with_air[:, :, 48:] = 0
    with torch.no_grad():
        near, other = network(image)[:, :, :8], network(with_air)[:, :, :8]
    assert torch.allclose(near, other, atol=1e-6) == same


def test_default_filters_and_heads_are_the_plan() -> None:
    network = dynunet(1, 2, (1, 1), (64, 64))  # 64-32-16-8-4
    assert tuple(network.filters) == (32, 64, 128, 256, 320)
    assert len(network.deep_supervision_heads) == 2
    assert len(dynunet(1, 2, (1, 1), (64, 64), deep_supervision_heads=3).deep_supervision_heads) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"filters": [8, 16]}, "do not make a U-Net"),
        ({"filters": [8, 16, 32, 64]}, "give 3 filters"),
        ({"filters": [8, 16, 32], "deep_supervision_heads": 2}, "1 to 1 auxiliary"),
        ({"filters": [8, 16, 32], "deep_supervision_heads": 0}, "1 to 1 auxiliary"),
        ({"norm": "instanse"}, "did you mean 'instance'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        dynunet(1, 2, ISOTROPIC, (16, 16, 16), **options)


def test_wrong_dimensions_are_refused() -> None:
    with pytest.raises(BundleError, match=r"2\.5"):
        segmentation_network(2, 1, 2, ISOTROPIC, (16, 16, 16))
    with pytest.raises(BundleError, match="volume"):
        segmentation_network(2.5, 1, 2, (1.0, 1.0), (16, 16))


class Pick(nn.Module):
    """A 2D network that returns one channel of its input."""

    def __init__(self, channel: int) -> None:
        super().__init__()
        self.channel = channel
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.shape[0])
        out = x[:, self.channel : self.channel + 1]
        return torch.stack([out, -out], 1) if self.training else out


# slices=3, two modalities: channels are [m0: -1, 0, +1, m1: -1, 0, +1]; at the ends the edge slice stands in
@pytest.mark.parametrize("modality", [0, 1])
@pytest.mark.parametrize(("offset", "shown"), [(-1, [0, 0, 1, 2]), (0, [0, 1, 2, 3]), (1, [1, 2, 3, 3])])
def test_channel_order_and_edges_of_the_stack(modality: int, offset: int, shown: list[int]) -> None:
    volume = torch.randn(2, 2, 5, 6, 4)
    network = SliceStackNetwork(Pick(modality * 3 + offset + 1), slices=3).eval()
    assert torch.equal(network(volume), volume[:, modality : modality + 1][..., shown])


def test_train_output_of_the_stack_keeps_heads_and_samples_apart() -> None:
    volume = torch.randn(2, 1, 5, 6, 4)
    out = SliceStackNetwork(Pick(1), slices=3).train()(volume)
    assert torch.equal(out, torch.stack([volume, -volume], 1))


def test_stacks_are_processed_in_chunks() -> None:
    volume = torch.randn(2, 1, 16, 16, 7)
    pick = Pick(1)
    assert torch.equal(SliceStackNetwork(pick, 3, images_per_pass=6).eval()(volume), volume)
    assert pick.seen == [6, 6, 2]  # three slices of two volumes at a time
    network = small_network(2.5).eval()
    whole = network(volume)
    network.images_per_pass = 1
    torch.testing.assert_close(network(volume), whole)


def test_a_volume_of_one_slice() -> None:
    volume = torch.randn(1, 1, 5, 6, 1)
    assert torch.equal(SliceStackNetwork(Pick(4), slices=5).eval()(volume), volume)


def test_stack_keeps_the_affine() -> None:
    affine = torch.diag(torch.tensor([2.0, 2.0, 5.0, 1.0], dtype=torch.float64))
    volume = MetaTensor(torch.randn(1, 1, 5, 6, 4), affine=affine)
    out = SliceStackNetwork(Pick(1), slices=3).eval()(volume)
    assert torch.equal(out.affine, affine)
    assert torch.equal(out.as_tensor(), volume.as_tensor())


def test_misuse_of_the_stack_is_refused() -> None:
    with pytest.raises(BundleError, match="no middle slice"):
        SliceStackNetwork(Pick(0), slices=4)
    with pytest.raises(BundleError, match="images_per_pass"):
        SliceStackNetwork(Pick(0), slices=3, images_per_pass=0)
    with pytest.raises(BundleError, match="five axes"):
        SliceStackNetwork(Pick(0), slices=3)(torch.zeros(1, 1, 8, 8))
