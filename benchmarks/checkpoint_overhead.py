"""What share of an epoch goes into checkpoints that survive a kill?

The demonstration's network and epoch (30 steps of 2 patches of 48^3): the time of ``last``, ``best`` and the state of
the run, synced to the disk and read back, beside the time of the steps. MONAI's ``CheckpointSaver`` content (one
``torch.save`` of network and optimiser, neither synced nor read back) is timed as the peer. Prints medians.

    .venv/bin/python benchmarks/checkpoint_overhead.py
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from pipelines.inference import AutocastInferer, choose_precision
from pipelines.losses import supervised_loss
from pipelines.networks import segmentation_network
from pipelines.training import averaged_network, save_weights
from pipelines.training.state import NetworkState, RandomState, tree_of, write_state

PATCH, BATCH, STEPS, ROUNDS = 48, 2, 30, 10


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that ``call`` takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Run the comparison and print it."""
    torch.manual_seed(0)
    shape = [PATCH] * 3
    network = segmentation_network(3, 3, 2, [2.0] * 3, shape, [16, 32, 64, 128]).train()
    average = averaged_network(network, 0.99)
    optimizer = torch.optim.AdamW(network.parameters())
    inferer = AutocastInferer(choose_precision("auto", "cpu"))
    loss = supervised_loss("dice_ce")
    image, label = torch.randn(BATCH, 3, *shape), (torch.rand(BATCH, 1, *shape) > 0.9).long()
    parts = {
        "network": NetworkState(network),
        "average": NetworkState(average),
        "optimizer": optimizer,
        "random": RandomState(),
    }

    def step() -> None:
        optimizer.zero_grad()
        loss(inferer(image, network), label).backward()
        optimizer.step()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = iter(range(1, 10**6))

        def ours() -> None:
            for kind in ("best", "last"):
                save_weights(average.module, {"contract": {}}, folder / f"{kind}.safetensors")
            write_state(folder, 0, next(count), tree_of(parts))

        def theirs() -> None:
            torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict()}, folder / "peer.pt")

        step()
        steps, saves, peers = ([timed(call) for _ in range(ROUNDS)] for call in (step, ours, theirs))
        files = {path.name: path.stat().st_size / 1e6 for path in sorted(folder.iterdir())}
    epoch = STEPS * median(steps)
    print(f"epoch of {STEPS} steps {epoch:.2f} s ({torch.get_num_threads()} threads)")
    print(f"best, last and state   {1000 * median(saves):7.1f} ms   {100 * median(saves) / epoch:.2f} % of the epoch")
    print(f"torch.save, unsynced   {1000 * median(peers):7.1f} ms   {100 * median(peers) / epoch:.2f} % of the epoch")
    print(", ".join(f"{file} {size:.1f} MB" for file, size in files.items()))


if __name__ == "__main__":
    main()
