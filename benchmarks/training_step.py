"""How long does a training step take, in which arithmetic, memory layout and with or without ``torch.compile``?

Forward, loss and backward of the lesion bundle's default network, deep supervision included, on one batch of patches;
all variants interleaved in one process. Prints medians, ratios to eager float32, and the largest difference of the main
head's logits from it. Run it on an idle machine.

    .venv/bin/python benchmarks/training_step.py [--patch 64] [--batch 2] [--rounds 7] [--device cpu]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median

import torch

from pipelines.inference import AutocastInferer
from pipelines.losses import supervised_loss
from pipelines.networks import segmentation_network
from pipelines.networks.memory_layout import lay_out_channels_last

VARIANTS = {
    "eager fp32": ("fp32", False, False),
    "bf16": ("bf16", False, False),
    "bf16, channels last": ("bf16", True, False),
    "bf16, compiled": ("bf16", False, True),
    "bf16, channels last, compiled": ("bf16", True, True),
}


def step_of(
    network: torch.nn.Module, variant: tuple[str, bool, bool], image: torch.Tensor, label: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Return a function that makes one step of ``variant`` and returns the main head's logits."""
    precision, channels_last, compiled = variant
    own = copy.deepcopy(network).to(image.device).train()
    if channels_last:
        lay_out_channels_last(own)
    called = torch.compile(own) if compiled else own
    inferer, loss = AutocastInferer(precision), supervised_loss("dice_ce")

    def step() -> torch.Tensor:
        own.zero_grad(set_to_none=True)
        heads = inferer(image, called)
        loss(heads, label).backward()
        if image.is_cuda:
            torch.cuda.synchronize()
        return heads[:, 0].detach()

    return step


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("patch", 64), ("batch", 2), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    shape = [options.patch] * 3
    network = segmentation_network(3, 3, 2, [1.0] * 3, shape, [16, 32, 64, 128])
    image = torch.randn(options.batch, 3, *shape, device=options.device)
    label = (torch.rand(options.batch, 1, *shape, device=options.device) > 0.9).long()
    steps = {name: step_of(network, variant, image, label) for name, variant in VARIANTS.items()}
    logits, times = {}, {name: [] for name in steps}
    for name, step in steps.items():
        start = time.perf_counter()
        logits[name] = step()
        print(f"{name:32s} first step {time.perf_counter() - start:6.1f} s", flush=True)
    for _ in range(options.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1000 * (time.perf_counter() - start))
    plain = median(times["eager fp32"])
    print(f"{torch.get_num_threads()} threads, {options.device}, batch {options.batch} x {options.patch}^3")
    for name, values in times.items():
        difference = float((logits[name] - logits["eager fp32"]).abs().max())
        print(
            f"{name:32s} {median(values):9.1f} ms   {plain / median(values):5.2f}x   logits differ by {difference:.1e}"
        )


if __name__ == "__main__":
    main()
