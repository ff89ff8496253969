"""What a training step does when something is wrong: name it, keep the evidence, go on only as long as that is sound.

A loss or a gradient that is not finite never reaches weights or running statistics: the step is left out, the batch is
kept for ``fiducial replay``, and the third one ends the run. Missing memory and dead workers are explained.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents

from pipelines.training.distributed import any_process, rank
from pipelines.training.replay import save_batch
from transforms.errors import DataError, ResourceError, find_error

logger = logging.getLogger(__name__)

NON_FINITE_STEPS_ALLOWED = 2
_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")
_NO_STORAGE = {
    getattr(errno, name, None)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EACCES", "EPERM", "EEXIST", "ENOTDIR")
}
_DEAD_WORKER = ("DataLoader worker", "exited unexpectedly")


class StepSkipped(Exception):  # noqa: N818 - no error, a decision
    """Leave this step out: no gradient of it may reach the weights."""


class FaultTolerantTrainer(SupervisedTrainer):
    """MONAI's trainer, in which a handler of a step may raise ``StepSkipped``."""

    def _iteration(self, engine: Any, batchdata: dict[str, torch.Tensor]) -> dict:
        statistics = [(buffer, buffer.clone()) for buffer in engine.network.buffers()]  # of batch normalisation
        try:
            return super()._iteration(engine, batchdata)
        except StepSkipped:
            for buffer, before in statistics:
                buffer.copy_(before)
            # with accumulation, the batches before it in the same optimiser step are given up with it
            engine.optimizer.zero_grad(set_to_none=True)
            return engine.state.output


class NonFiniteSteps:
    """Leave out a step whose loss or gradient is NaN or infinite; stop at the third. Nothing is put in its place.

    Args:
        folder: where the batches go, ``batch-<epoch>-<iteration>.safetensors``.
        network: whose weights are kept with the batch.
        header: what the kept batch says of its run besides what is wrong (see ``pipelines.training.replay``).
    """

    def __init__(self, folder: Path, network: torch.nn.Module, header: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.network = network
        self.header = dict(header)
        self.count = 0

    def attach(self, engine: Engine) -> None:
        """Register on a ``FaultTolerantTrainer``."""
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._loss)

    def state_dict(self) -> dict[str, Any]:
        """Return how many there were."""
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from there."""
        self.count = int(state["count"])

    def _loss(self, engine: Any) -> None:
        terms = {"loss": engine.state.output["loss"], **getattr(engine.loss_function, "last_terms", {})}
        values = {name: float(value.detach()) for name, value in terms.items()}
        bad = sorted(name for name, value in values.items() if not math.isfinite(value))
        if any_process(bool(bad), engine.state.device):
            self.leave_out(engine, f"term {', '.join(bad)} of the loss" if bad else "", values)

    def leave_out(self, engine: Any, what: str, values: Mapping[str, float]) -> None:
        """Count the step, keep its batch, and raise.

        Args:
            what: is not finite, in this process; empty where the trouble is in another one.
            values: the figures of the step.

        Raises:
            StepSkipped: the run goes on without this step.
            DataError: it was the third.
        """
        self.count += 1
        state = engine.state
        where = f"epoch {state.epoch}, iteration {state.iteration}, cases {', '.join(state.batch.get('case', []))}"
        path = self.folder / f"batch-{state.epoch:04d}-{state.iteration:09d}-{rank()}.safetensors"
        if what:
            figures = {name: str(value) for name, value in values.items()}  # text, because JSON has no NaN
            about = {"epoch": state.epoch, "iteration": state.iteration, "not_finite": what, "figures": figures}
            save_batch(path, state.batch, self.network, {**self.header, **about})
        if self.count > NON_FINITE_STEPS_ALLOWED:
            raise DataError(
                f"{what or 'the loss in another process'} is not finite at {where}, for the third time in this run",
                f"figures: {', '.join(f'{name} {value}' for name, value in values.items())}",
                f"look at these cases, lower learning_rate, or see `fiducial replay {path}`",
            )
        logger.warning(
            "%s is not finite at %s: this step is left out (%d of %d allowed)%s",
            what or "the loss in another process",
            where,
            self.count,
            NON_FINITE_STEPS_ALLOWED,
            f"; see `fiducial replay {path}`" if what else "",
        )
        raise StepSkipped


class CountBadCases:
    """Count the samples that the data set could not make and replaced, per case; say so once for each case."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def attach(self, engine: Engine) -> None:
        """Register on the trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        for case, reason in engine.state.batch.get("bad_cases", []):
            if case not in self.counts:
                logger.warning("case %s is skipped and counted: %s", case, reason)
            self.counts[case] += 1

    def state_dict(self) -> dict[str, Any]:
        """Return samples lost per case."""
        return {"counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from there."""
        self.counts = Counter(state["counts"])


@contextlib.contextmanager
def explained(sizes: Mapping[str, Any], knobs: str) -> Iterator[None]:
    """Turn memory that does not suffice, a disk that cannot be written and a worker that died into three lines.

    Args:
        sizes: what was to fit, for instance batch_size 2 and patch_size [96, 96, 96].
        knobs: what to turn, the best first.

    Raises:
        ResourceError: memory did not suffice, a worker died, or somebody else's writer (TensorBoard's) failed.
    """
    try:
        yield
    except OSError as problem:
        if find_error(problem) is not None or problem.errno not in _NO_STORAGE:
            raise
        raise ResourceError(
            f"{problem.filename or 'a file of the run'}: cannot be written",
            str(problem),
            "free space or fix the permissions, then resume the run",
        ) from problem
    except (RuntimeError, MemoryError) as problem:
        if find_error(problem) is not None:
            raise
        text = str(problem)
        if isinstance(problem, (MemoryError, torch.OutOfMemoryError)) or any(sign in text for sign in _NO_MEMORY):
            raise ResourceError(
                "out of memory with " + ", ".join(f"{name} {value}" for name, value in sizes.items()),
                text.splitlines()[0] if text else "",
                knobs,
            ) from problem
        if all(sign in text for sign in _DEAD_WORKER) or "is killed by signal" in text:
            raise ResourceError(
                "a worker process that prepares patches died",
                text.splitlines()[0],
                "most often the system killed it for want of memory: take fewer --workers, or 0",
            ) from problem
        raise
