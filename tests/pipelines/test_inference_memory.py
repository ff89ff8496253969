"""What a forward pass needs, counted by hand, and an image that does not fit: refused before anything is computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipelines.inference import inferers, windows_or_whole
from pipelines.inference.memory import available_bytes, forward_bytes
from pipelines.networks import segmentation_network
from transforms.errors import ResourceError


def test_this_machine_has_some() -> None:
    available = available_bytes()
    assert available is not None
    assert 2**28 < available < 2**50


def test_a_chain_by_hand() -> None:
    """Values of 10 x 10 x 10 voxels in float32, 4,000 bytes a channel.

    image 1 | first 4, changed in place | second 2 | third 8
    alive:    1 + 4 = 5                   1+4+2 = 7  1+2+8 = 11: the first is gone
    """
    network = nn.Sequential(nn.Conv3d(1, 4, 1), nn.ReLU(inplace=True), nn.Conv3d(4, 2, 1), nn.Conv3d(2, 8, 1))
    assert forward_bytes(network, (1, 1, 10, 10, 10)) == 11 * 4000
    assert forward_bytes(network[:3], (1, 1, 10, 10, 10)) == 7 * 4000
    assert forward_bytes(network, (2, 1, 10, 10, 10)) == 22 * 4000


def test_what_a_skip_connection_keeps_counts() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv3d(1, 4, 1), nn.Conv3d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = self.first(x)
            return torch.cat([kept, self.second(self.second(kept))], dim=1)

    # image 1, kept 4, second's result 4, joined 8
    assert forward_bytes(Skip(), (1, 1, 10, 10, 10)) == 17 * 4000


def test_it_grows_with_the_image_and_touches_nothing() -> None:
    network = segmentation_network(3, 2, 2, [1.0] * 3, [16] * 3, [4, 8, 8], norm="batch").train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    small, large = (forward_bytes(network, (1, 2, size, 32, 32)) for size in (32, 64))
    assert large == pytest.approx(2 * small, rel=1e-4)  # beside it, a few figures per channel
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    # an hour of a large machine, were it computed
    assert forward_bytes(network, (1, 2, 4096, 4096, 4096)) > 2**40


def test_an_image_that_does_not_fit_is_refused_before_the_network_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    network = segmentation_network(3, 2, 2, [1.0] * 3, [16] * 3, [4, 8, 8], norm="batch").eval()
    calls: list[torch.Size] = []

    def called(given: torch.Tensor) -> torch.Tensor:
        calls.append(given.shape)
        return network(given)

    whole, image = windows_or_whole("whole", [16] * 3, 0.5, network), torch.zeros(1, 2, 32, 30, 32)
    needed = inferers.FORWARD_WORKSPACE * forward_bytes(network, (1, 2, 32, 32, 32))
    monkeypatch.setattr(inferers, "available_bytes", lambda device: int(needed) - 1)
    with torch.no_grad(), pytest.raises(ResourceError, match="image of 32x32x32 voxels does not fit") as caught:
        whole(image, called)
    assert "--window patch" in caught.value.fix
    assert calls == []
    monkeypatch.setattr(inferers, "available_bytes", lambda device: int(needed) + 1)
    with torch.no_grad():
        assert whole(image, called).shape == (1, 2, 32, 30, 32)
    assert len(calls) == 1
    monkeypatch.setattr(inferers, "available_bytes", lambda device: 0)
    with torch.no_grad():  # counted once for a size
        assert whole(torch.flip(image, [2]), called).shape == (1, 2, 32, 30, 32)
        with pytest.raises(ResourceError):
            whole(image[..., :16], called)
    monkeypatch.setattr(inferers, "available_bytes", lambda device: None)  # a system that does not say
    with torch.no_grad():
        assert whole(image[..., :16], called).shape == (1, 2, 32, 30, 16)
