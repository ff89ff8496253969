"""One process of several: what ``test_distributed`` makes each of them do. Arguments: folder for results, manifest.

Every scenario leaves ``<scenario>/rank<k>.json`` and what it trains in ``<scenario>/run``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.data import DataLoader as MonaiLoader
from monai.engines import SupervisedEvaluator
from monai.inferers import SimpleInferer
from monai.transforms import AsDiscreted, Compose
from safetensors.torch import save_file
from small_runs import Boxes, small_run, validation_cases, weights_of

from pipelines.manifests import case_items, load_manifest
from pipelines.training import TrainingRun, ValidationDice, VolumeDataset, join_processes, leave_processes
from pipelines.training.distributed import rank, wait_for_all, world_size
from pipelines.training.engines import Validate
from transforms import ForegroundMaskd, LoadCased, ToRASd
from transforms.errors import BundleError, InterruptedRun

PLAN = {"max_epochs": 4, "steps_per_epoch": 4, "batch_size": 6}


class OwnCrossEntropy(torch.nn.Module):
    """Of this process's share of the batch alone: the bundles' losses are sums over all processes."""

    def forward(self, outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs, target[:, 0].long())


class At:
    """Call ``action`` after the given iteration."""

    def __init__(self, iteration: int, action: Callable[[Any], None]) -> None:
        self.iteration, self.action = iteration, action

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=self.iteration), self.action)


def train(folder: Path) -> dict[str, Any]:
    """Two validation cases: with three processes one has none. Whatever another process writes lies elsewhere."""
    mine = folder / ("run" if rank() == 0 else f"elsewhere{rank()}")
    mine.mkdir(parents=True)
    run = small_run(mine, cases=validation_cases(2), plan=PLAN)
    run.run()
    return finished(run, folder)


def interrupted(folder: Path) -> dict[str, Any]:
    """The last process alone is asked to stop, in the middle of an epoch; then the run goes on."""

    def build(name: str, *handlers: At) -> TrainingRun:
        run = small_run(folder / name, dropout=0.5, cases=validation_cases(2), plan=PLAN, handlers=handlers)
        torch.manual_seed(100 + rank())  # otherwise all would draw the same, and one could take another one's place
        return run

    whole = build("whole")
    whole.run()
    asked = At(6, lambda engine: os.kill(os.getpid(), signal.SIGTERM))
    cut = build("run", *([asked] if rank() == world_size() - 1 else []))
    try:
        cut.run()
    except InterruptedRun as stopped:
        message = str(stopped)
    wait_for_all()  # as after a real end: nobody starts again before the main process has written
    states = sorted(path.name for path in (folder / "run" / "checkpoints").glob("state-*"))
    resumed = build("run")
    torch.manual_seed(0)  # the generators come from the state
    resumed.run()
    pairs = zip(weights_of(whole).values(), weights_of(resumed).values(), strict=True)
    difference = max(float((one - two).abs().max()) for one, two in pairs)
    return {**finished(resumed, folder), "message": message, "states": states, "difference": difference}


def nan(folder: Path) -> dict[str, Any]:
    """The last sample of the second batch, which only the last process sees, is NaN."""

    def spoil(sample: dict[str, Any]) -> None:
        if sample["case"] == "epoch1_sample11":
            sample["image"][0, 0, 0, 0] = float("nan")

    weights: list[dict[str, torch.Tensor]] = []
    look = [At(step, lambda _: weights.append(weights_of(run))) for step in (1, 2, 3)]
    run = small_run(folder / "run", data=Boxes(spoil), plan=PLAN, handlers=look, loss=lambda name: OwnCrossEntropy())
    run.run()

    def moved(before: int, after: int) -> bool:
        return any(not torch.equal(weights[before][name], weights[after][name]) for name in weights[0])

    return {**finished(run, folder), "moved": [moved(0, 1), moved(1, 2)]}


def uneven(folder: Path) -> dict[str, Any]:
    """A batch of 5 cannot be shared by 2 or 3."""
    try:
        small_run(folder / "run", plan={"batch_size": 5}).run()
    except BundleError as problem:
        return {"message": str(problem)}
    return {}


def validation(folder: Path) -> dict[str, Any]:
    """Validate five cases of a cohort, then a single one, with a network that nobody trained."""
    cohort = load_manifest(Path(sys.argv[2]))
    items = [item for split in ("train", "validation", "test") for item in case_items(cohort, split)]
    torch.manual_seed(1)
    network = torch.nn.Conv3d(2, 2, 3, padding=1)
    results = {}
    for number in (5, 1):
        chain = Compose(
            [LoadCased(modalities=("flair", "t1")), ToRASd(["image", "label", "mask"]), ForegroundMaskd("image")]
        )
        data = VolumeDataset(items[:number], chain, lambda item: item, str(folder / "cache"), [1])
        metrics = {"mean_dice": ValidationDice({1: "lesion"})}
        evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=MonaiLoader(data, batch_size=1),
            network=network,
            inferer=SimpleInferer(),
            postprocessing=AsDiscreted("pred", argmax=True),
            key_val_metric=metrics,
        )
        trainer = type("Trainer", (), {"state": type("State", (), {"epoch": 1})})
        Validate(evaluator, 1, metrics)(trainer)  # type: ignore[arg-type]
        cases = [case.values["case"] for case in data.cases]
        results[str(number)] = {"metrics": dict(evaluator.state.metrics), "cases": cases, "all": data.n_cases}
    return results


def finished(run: TrainingRun, folder: Path) -> dict[str, Any]:
    save_file(weights_of(run), folder / f"rank{rank()}.safetensors")
    return {"outcome": run.outcomes[-1]}


SCENARIOS = {each.__name__: each for each in (train, interrupted, nan, uneven, validation)}


def main() -> None:
    join_processes("cpu")
    for name, scenario in SCENARIOS.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank{rank()}.json").write_text(json.dumps(scenario(folder)))
    leave_processes()


if __name__ == "__main__":
    main()
