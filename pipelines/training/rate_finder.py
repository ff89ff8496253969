"""The learning-rate range test of a bundle: where the loss falls fastest, before a run is started.

ignite's ``FastaiLRFinder`` drives the test, not MONAI's ``LearningRateFinder``: it attaches to MONAI's trainer, so the
rates are tested with the inferer, arithmetic, accumulation and clipping of a run; MONAI's has a loop of its own without
them. Both mistake NaN for progress (no comparison with it holds), so it is given to them as infinity. Both suggest by
single differences of a lagging mean: two seeds of one bundle gave .14 and .29, where .002 is right. Hence the centred
mean here.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine, Events
from ignite.handlers import FastaiLRFinder
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer
from scipy.ndimage import gaussian_filter1d
from torch.utils.data import DataLoader

from pipelines.files import write_atomically
from pipelines.runner import absolute, bundle_parser
from pipelines.training.handlers import SeedEpoch, optimizer_steps_now
from pipelines.training.loaders import patch_loader
from pipelines.training.phases import optimizer_for, parameter_groups
from transforms.errors import BundleError

logger = logging.getLogger(__name__)

STEPS, FIRST_RATE, LAST_RATE = 100, 1e-6, 1.0
DIVERGED = 5.0  # times the lowest loss so far, in ignite's running mean; and times the first loss, in ours
SMOOTHING = 0.06  # of the steps: standard deviation of the centred mean


@dataclass(frozen=True)
class RateTest:
    """What a range test measured, step by step.

    Attributes:
        rates: learning rate of each step, rising exponentially.
        losses: loss of each step's batch; infinity where it was not finite.
        smoothed: centred mean of the losses.
        diverged: the test ended because the loss rose to ``DIVERGED`` times its lowest value, as it should.
        suggestion: the rate at which the smoothed loss falls fastest.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    diverged: bool
    suggestion: float


def range_test(
    *,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: torch.nn.Module,
    loader: DataLoader,
    device: torch.device,
    inferer: Inferer,
    precision: str = "fp32",
    accumulation_steps: int = 1,
    clip_norm: float = math.inf,
    steps: int = STEPS,
    first_rate: float = FIRST_RATE,
    last_rate: float = LAST_RATE,
) -> RateTest:
    """Train with a rate that rises from ``first_rate`` to ``last_rate`` until the loss diverges (Smith, 2017).

    Afterwards the network and the optimiser are as they were before. All groups of parameters get the same rate.

    Args:
        loader: batches of ``collate_batch``; its data set has ``set_epoch``.
        precision: from ``choose_precision``.
        steps: batches at most.

    Raises:
        BundleError: the loss is not finite from the first step, or it never falls.
    """
    recorder = _Recorder(optimizer, clip_norm)
    trainer = SupervisedTrainer(
        device=device,
        max_epochs=-(-steps // len(loader)),
        train_data_loader=loader,
        network=network,
        optimizer=optimizer,
        loss_function=loss,
        inferer=inferer,
        accumulation_steps=accumulation_steps,
        amp=precision == "fp16",
        decollate=False,
        train_handlers=[SeedEpoch(loader.dataset), recorder],
    )
    finder = FastaiLRFinder()
    to_save = {"network": network, "optimizer": optimizer}
    options = {"num_iter": steps, "start_lr": first_rate, "end_lr": last_rate, "diverge_th": DIVERGED}
    with (
        _rate_of(optimizer, first_rate),
        warnings.catch_warnings(),
        finder.attach(trainer, to_save, _finite_or_infinite, **options),
    ):
        warnings.filterwarnings("ignore", message="Run completed without loss diverging")  # said in our own words
        trainer.run()
    lagging = finder.get_results()["loss"]
    diverged = lagging[-1] > DIVERGED * min(lagging)
    suggestion, smoothed = steepest_rate(recorder.rates, recorder.losses)
    return RateTest(recorder.rates, recorder.losses, smoothed, diverged, suggestion)


@contextlib.contextmanager
def _rate_of(optimizer: torch.optim.Optimizer, rate: float) -> Iterator[None]:
    """Give every group ``rate`` for a while: ignite's first step would be made at the rate that it finds."""
    before = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = rate
    yield
    for group, value in zip(optimizer.param_groups, before, strict=True):
        group["lr"] = value
        group.pop("initial_lr", None)  # of the finder's schedule; the one of a run would start from it


def steepest_rate(rates: Sequence[float], losses: Sequence[float]) -> tuple[float, list[float]]:
    """Return the rate at which the loss falls fastest, before it is lowest, and the smoothed losses.

    Args:
        rates: in equal steps of their logarithm.
        losses: infinite where they were not finite.

    Raises:
        BundleError: the loss never falls.
    """
    bounded = np.minimum(losses, DIVERGED * losses[0])  # else the end of a divergence would outshine everything
    smoothed = gaussian_filter1d(bounded, max(1.0, SMOOTHING * len(losses)), mode="nearest")
    slopes = np.gradient(smoothed)[: int(smoothed.argmin()) + 1]
    if slopes.min() >= 0:
        raise BundleError(
            "learning-rate range test: the loss never falls",
            f"it starts at {losses[0]:.4g} and is never lower",
            "look at the data and the loss; or start at a lower rate",
        )
    return float(rates[int(slopes.argmin())]), smoothed.tolist()


class _Recorder:
    """Clips the gradients as a run does, and keeps rate and loss of every step."""

    def __init__(self, optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.rates: list[float] = []
        self.losses: list[float] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._clip)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._record)

    def _clip(self, engine: Engine) -> None:
        if optimizer_steps_now(engine):
            if engine.scaler is not None:
                engine.scaler.unscale_(engine.optimizer)
            torch.nn.utils.clip_grad_norm_(engine.network.parameters(), self.clip_norm)

    def _record(self, engine: Engine) -> None:
        self.rates.append(float(self.optimizer.param_groups[0]["lr"]))
        self.losses.append(_finite_or_infinite(engine.state.output))
        if math.isinf(self.losses[0]):
            raise BundleError(
                "learning-rate range test: the loss of the first step is not finite",
                f"cases {', '.join(engine.state.batch.get('case', []))}, before anything was learnt",
                "look at these cases, or try --precision fp32",
            )


def _finite_or_infinite(output: Mapping[str, torch.Tensor]) -> float:
    loss = float(output["loss"].detach())
    return loss if math.isfinite(loss) else math.inf


def find_rate_of_bundle(
    bundle: str,
    output: str | Path,
    overrides: Mapping[str, Any],
    steps: int = STEPS,
    first_rate: float = FIRST_RATE,
    last_rate: float = LAST_RATE,
) -> RateTest:
    """Run the range test with the network, the loss, the data and the optimiser of a bundle's ``train.yaml``.

    No run is made or touched: network and optimiser live in memory and are thrown away. Of several phases, the first
    is tested.

    Args:
        bundle: path or name.
        output: folder for ``rates.csv`` (rate, loss, smoothed loss) and ``rates.png``.
        overrides: hyper-parameters of the bundle's ``train.yaml``.
    """
    folder = Path(absolute(output))
    with bundle_parser(bundle, "train", overrides) as parser:
        content = parser.get_parsed_content
        torch.manual_seed(int(content("seed")))
        network, phase = content("network"), content("plan")[0]
        test = range_test(
            network=network,
            optimizer=optimizer_for(content("optimizer"), parameter_groups(network, phase)),
            loss=content("loss")(phase.loss),
            loader=patch_loader(content("train::dataset"), phase.steps_per_epoch, phase.batch_size, content("workers")),
            device=content("device"),
            inferer=content("train::inferer"),
            precision=content("arithmetic"),
            accumulation_steps=phase.accumulation_steps,
            clip_norm=content("clip_norm"),
            steps=steps,
            first_rate=first_rate,
            last_rate=last_rate,
        )
    write_rates(test, folder)
    if not test.diverged:
        logger.warning("the loss did not diverge up to a rate of %.3g; the suggestion may be low", max(test.rates))
    logger.info("suggested learning_rate: %.2g (see %s)", test.suggestion, folder / "rates.png")
    return test


def write_rates(test: RateTest, folder: Path) -> None:
    """Write ``rates.csv`` and ``rates.png`` of a test into ``folder``."""
    table = pd.DataFrame({"rate": test.rates, "loss": test.losses, "smoothed_loss": test.smoothed})
    write_atomically(folder / "rates.csv", table.to_csv(index=False).encode())
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(test.rates, test.losses, color="0.8", label="loss of the batch")
    axes.plot(test.rates, test.smoothed, color="C0", label="centred mean")
    axes.axvline(test.suggestion, color="C3", linestyle="--", label=f"suggestion {test.suggestion:.2g}")
    limits = (0.9 * min(test.smoothed), 1.5 * test.losses[0])
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=limits)
    axes.legend()
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_atomically(folder / "rates.png", picture.getvalue())
