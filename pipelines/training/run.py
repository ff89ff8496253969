"""A training run from its first phase to its last, which goes on after a kill where it stood, bit for bit.

One network lives through all phases: each starts from the best weights of the one before, loaded in place, so that
there is never a second copy on the device. The run's state is written after every epoch, and on request every so many
steps and when the system asks the process to stop.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import yaml
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from monai.engines import SupervisedEvaluator
from monai.inferers import Inferer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from pipelines.files import sweep_temporaries
from pipelines.networks.memory_layout import lay_out_channels_last
from pipelines.training.board import hyper_parameters_of
from pipelines.training.checkpoints import load_weights, read_header
from pipelines.training.distributed import (
    any_process,
    from_every_process,
    from_main_process,
    is_main_process,
    rank,
    wait_for_all,
)
from pipelines.training.engines import EngineSettings, PhaseEngine, phase_engine
from pipelines.training.faults import explained
from pipelines.training.handlers import optimizer_steps_now
from pipelines.training.loaders import patch_loader
from pipelines.training.outcome import figures_of, outcome_line, phase_outcome, run_outcome, watch_record
from pipelines.training.phases import Phase, optimizer_for, parameter_groups
from pipelines.training.resume import release
from pipelines.training.run_folder import extend_record
from pipelines.training.schedule import polynomial_with_warmup
from pipelines.training.signals import stop_signals
from pipelines.training.state import RandomState, newest_state, read_state, restore_parts, tree_of, write_state
from pipelines.training.tracking import MlflowLog
from pipelines.training.watchdogs import Watchdogs, artefacts_at_the_end, watch_limits
from transforms.errors import BundleError, FiducialError, InterruptedRun

logger = logging.getLogger(__name__)


class TrainingRun:
    """The run of a bundle: ``train#trainer`` of its configuration.

    Args:
        network: on its device, with its first weights.
        average: ``averaged_network(network, decay)``.
        loss: name of a loss -> the loss, on logits, with ``last_terms``.
        optimizer: groups of parameters -> optimiser; every group brings its rate.
        dataset: of training samples, with ``set_epoch``.
        max_epochs: of a phase that says nothing else. It stands here because MONAI's workflows look for it here, and
            set it; the phases have been planned with it.
        phases: of ``plan_phases``.
        run: the run's folder.
        header: what the weights' header says besides epoch and metric (must hold the ``contract``).
        colours: ``#rrggbb`` per label id, for the overlays.
        labels: name per label id.
        pictures: draws a case of the validation for TensorBoard; None = as a segmentation.
        device, inferer, precision: of a training step.
        workers: processes that prepare samples.
        clip_norm: largest total norm of the gradient.
        compiled: run the network through ``torch.compile``.
        channels_last: lay tensors out channel by channel last.
        validator: validates ``average.module``; None = no validation cases.
        metrics: of the validator, by name.
        validation_interval: epochs.
        min_delta: what counts as an improvement of the validator's metric.
        state_interval: steps between two states within an epoch; 0 = only at its end.
        sizes, knobs: for the message when memory does not suffice: what was to fit, and what to turn.
        mlflow_uri: of ``tracking.store_uri``; empty = TensorBoard alone.
        handlers: further ignite handlers of the bundle.
        acknowledge: findings of the watchdogs to accept, ``<rule>: <reason>`` each: they never end the run.
        thresholds: limits of the watchdogs that differ from their defaults, ``<rule>.<limit>=<number>`` each.
    """

    def __init__(
        self,
        *,
        network: torch.nn.Module,
        average: AveragedModel,
        loss: Callable[[str], torch.nn.Module],
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        dataset: Any,
        max_epochs: int,
        phases: Sequence[Phase],
        run: str | Path,
        header: Mapping[str, Any],
        colours: Mapping[int, str],
        labels: Mapping[int, str],
        device: torch.device,
        inferer: Inferer,
        precision: str,
        workers: int = 0,
        clip_norm: float = 12.0,
        compiled: bool = False,
        channels_last: bool = False,
        validator: SupervisedEvaluator | None = None,
        metrics: Mapping[str, Metric] | None = None,
        validation_interval: int = 1,
        min_delta: float = 0.0,
        state_interval: int = 0,
        sizes: Mapping[str, Any] | None = None,
        knobs: str = "take a smaller batch_size, then a smaller patch_size",
        mlflow_uri: str = "",
        pictures: Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]] | None = None,
        handlers: Sequence[Any] = (),
        acknowledge: Sequence[str] = (),
        thresholds: Sequence[str] = (),
    ) -> None:
        self.network, self.average = network, average
        self.loss, self.optimizer, self.dataset = loss, optimizer, dataset
        self.phases, self.run_dir = list(phases), Path(run)
        self.max_epochs = max_epochs
        self.header = {**header, "precision": precision, "run": self.run_dir.name}
        self.validator, self.workers, self.state_interval = validator, int(workers), int(state_interval)
        self.sizes, self.knobs = dict(sizes or {}), knobs
        self.settings = EngineSettings(
            device=device,
            inferer=inferer,
            precision=precision,
            clip_norm=clip_norm,
            compiled=compiled,
            validator=validator,
            metrics=metrics or {},
            validation_interval=validation_interval,
            min_delta=min_delta,
            colours=colours,
            labels=labels,
            pictures=pictures,
            handlers=handlers,
            acknowledge=acknowledge,
            thresholds=thresholds,
        )
        self.mlflow_uri = mlflow_uri
        self.mlflow: MlflowLog | None = None
        if channels_last:
            lay_out_channels_last(network)
        self.random = RandomState()
        self.outcomes: list[dict[str, Any]] = []
        self.watchdogs: Watchdogs | None = None
        self.minutes_before = 0.0
        self.started = time.monotonic()

    def run(self) -> None:
        """Train every phase that is not finished yet; write the outcome into ``record.json``.

        Raises:
            InterruptedRun: the process was asked to stop; the state is saved.
            BundleError: a phase that took no step, or whose weights were never worth keeping; or the watchdogs say that
                going on is pointless.
            DataError: the loss was not finite three times.
            ResourceError: memory did not suffice, a worker died, or nothing can be written.
        """
        self.started = time.monotonic()
        logger.info("training in %s; watch it with: tensorboard --logdir %s", self.run_dir, self.run_dir)
        hyper_parameters = self._hyper_parameters()
        if self.mlflow_uri:
            self.mlflow = MlflowLog(
                self.run_dir, self.mlflow_uri, hyper_parameters, self.validator, active=is_main_process()
            )
        try:
            engine = self._run_phases()
            with explained({}, ""):  # a full disk
                self._write_outcome(engine, hyper_parameters)
        except BaseException as problem:
            if isinstance(problem, FiducialError):
                self._record_findings_of_a_failure()
            if self.mlflow is not None:
                self.mlflow.finish({}, status="FAILED")
            raise
        finally:
            release(self.run_dir)

    def _hyper_parameters(self) -> dict[str, Any]:
        """Return the hyper-parameters of the bundle that runs, from its resolved configuration."""
        path = self.run_dir / "config.yaml"
        return hyper_parameters_of(yaml.safe_load(path.read_text())) if path.is_file() else {}

    def _run_phases(self) -> PhaseEngine:
        """Train every phase that is not finished; return the engine of the last."""
        for phase in self.phases:
            self._learning(phase)  # a mistake in the last phase must not show only when the others are trained
        if is_main_process():
            sweep_temporaries(self.run_dir)
        tree = self._newest_tree()
        first = 0
        engine: PhaseEngine
        if tree is not None:
            first, self.outcomes, self.minutes_before = int(tree["phase"]), list(tree["outcomes"]), tree["minutes"]
        for number in range(first, len(self.phases)):
            phase = self.phases[number]
            if number > 0 and (tree is None or number > first):
                self._start_from_the_phase_before(number)
            engine = self._build(phase, number)
            self.watchdogs = engine.watchdogs
            if tree is not None and number == first:
                self._restore(engine, tree)
            else:
                engine.board.load_state_dict({"files": {}})  # what a run left that died before its first state
            self._train(engine, phase, number)
            engine.watchdogs.raise_if_stopping()  # also where a run is resumed that was stopped in its last epoch
            outcome = phase_outcome(phase.name, engine, self.validator is not None)
            self._watch_the_end(engine, outcome)
            if number == len(self.phases) - 1:  # the start of the next phase refuses what this one has left by itself
                engine.watchdogs.raise_if_stopping()
            self.outcomes.append({**outcome, "findings": engine.watchdogs.record()})
            logger.info(outcome_line(outcome, self._minutes()))
        return engine

    def _newest_tree(self) -> dict[str, Any] | None:
        """Return the newest state that the main process can read: all processes have to go on from the same one."""
        found = newest_state(self.states) if is_main_process() else None
        path = from_main_process(str(found[0]) if found else "")
        tree = found[1] if found else read_state(path) if path else None
        wait_for_all()  # nobody trains on, and writes, before everybody has read
        return tree

    @property
    def states(self) -> Path:
        """The folder of the run's states."""
        return self.run_dir / "checkpoints"

    def checkpoints(self, number: int) -> Path:
        """Return the folder of a phase's checkpoints: those of the last phase are the run's."""
        last = number == len(self.phases) - 1
        return self.run_dir / "checkpoints" if last else self._phase_folder(number) / "checkpoints"

    def _phase_folder(self, number: int) -> Path:
        return self.run_dir / "phases" / f"{number}_{self.phases[number].name}"

    def _build(self, phase: Phase, number: int) -> PhaseEngine:
        several = len(self.phases) > 1
        if several:
            logger.info("phase %d of %d: %s", number + 1, len(self.phases), phase.name)
        loss, optimizer, scheduler = self._learning(phase)
        board = self.run_dir / "tensorboard"
        if self.mlflow is not None and several:
            self.mlflow.phase = phase.name
        return phase_engine(
            phase,
            number,
            self.settings,
            network=self.network,
            average=self.average,
            loss=loss,
            loader=patch_loader(self.dataset, phase.steps_per_epoch, phase.batch_size, self.workers),
            optimizer=optimizer,
            scheduler=scheduler,
            checkpoints=self.checkpoints(number),
            tensorboard=board / f"{number}_{phase.name}" if several else board,
            batches=self.run_dir / "batches",
            header={**self.header, "phase": phase.name},
            mlflow=self.mlflow,
        )

    def _learning(self, phase: Phase) -> tuple[torch.nn.Module, torch.optim.Optimizer, LRScheduler]:
        """Return loss, optimiser and schedule of a phase; what does not learn in it is frozen."""
        optimizer = optimizer_for(self.optimizer, parameter_groups(self.network, phase))
        steps = phase.optimizer_steps_per_epoch
        scheduler = polynomial_with_warmup(
            optimizer, steps * phase.max_epochs, steps * phase.warmup_epochs, phase.decay_power
        )
        return self.loss(phase.loss), optimizer, scheduler

    def _start_from_the_phase_before(self, number: int) -> None:
        """Load the best weights of the phase before into the network and its average."""
        before = self.phases[number - 1]
        folder = self.checkpoints(number - 1)
        best = folder / ("best.safetensors" if self.validator is not None else "last.safetensors")
        wait_for_all()  # the main process may still be writing it
        header = read_header(best)
        if header.get("phase") != before.name or header.get("epoch", 0) < 1:
            raise BundleError(
                f"{best}: not the result of phase {before.name}",
                f"its header says phase {header.get('phase')!r}, epoch {header.get('epoch')}",
                "do not change the checkpoints of a run; start a new one",
            )
        load_weights(self.network, best)
        load_weights(self.average.module, best)
        self.average.n_averaged.zero_()
        if self.validator is not None:
            self.validator.state.metrics = {}
        logger.info("phase %s starts from %s (epoch %d)", self.phases[number].name, best, header["epoch"])

    def _restore(self, engine: PhaseEngine, tree: Mapping[str, Any]) -> None:
        trainer = engine.trainer
        iteration, length = int(tree["iteration"]), self.phases[int(tree["phase"])].steps_per_epoch
        restore_parts(engine.parts, tree["parts"])
        trainer.state.iteration = iteration
        trainer.state.epoch = iteration // length
        trainer.state.epoch_length = length
        trainer.data_loader.batch_sampler.first_step = iteration % length
        own = dict(tree["own"][min(rank(), len(tree["own"]) - 1)])
        generators = own.pop("random")
        restore_parts(engine.own, own)
        if engine.finished:  # the phase after it goes on from there
            self.random.load_state_dict(generators)
        else:  # last of all: building and starting have drawn from the generators
            trainer.add_event_handler(Events.STARTED, lambda e: self.random.load_state_dict(generators))
        logger.info(
            "resuming %s after %d steps, epoch %d",
            self.run_dir.name,
            iteration,
            trainer.state.epoch + bool(iteration % length),
        )

    def _train(self, engine: PhaseEngine, phase: Phase, number: int) -> None:
        trainer = engine.trainer
        if engine.finished:
            return

        with stop_signals() as asked, explained({"batch_size": phase.batch_size, **self.sizes}, self.knobs):

            def after_step(_: Engine) -> None:
                step = trainer.state.iteration % trainer.state.epoch_length
                if step == 0 or not optimizer_steps_now(trainer):
                    return  # the end of the epoch comes now, with its own save; half an optimiser step cannot be saved
                stop = any_process(asked.name is not None, trainer.state.device)
                if stop or (self.state_interval and step % self.state_interval == 0):
                    engine.keeper.save_last(trainer.state.epoch)
                    self._save(engine, number)
                if stop:
                    interrupt()

            def after_epoch(_: Engine) -> None:
                self._save(engine, number)
                engine.watchdogs.raise_if_stopping()
                if any_process(asked.name is not None, trainer.state.device) and not engine.finished:
                    interrupt()

            def interrupt() -> NoReturn:
                wait_for_all()  # a launcher stops the others soon after the first has left: the main process writes yet
                raise InterruptedRun(
                    f"run {self.run_dir.name}: asked to stop ({asked.name or 'another process'})",
                    f"its state is saved, in epoch {trainer.state.epoch}, after {trainer.state.iteration} steps",
                    f"go on with: --resume True --run_name {self.run_dir.name}",
                )

            trainer.add_event_handler(Events.ITERATION_COMPLETED, after_step)
            trainer.add_event_handler(Events.EPOCH_COMPLETED, after_epoch)
            trainer.run()

    def _save(self, engine: PhaseEngine, number: int) -> None:
        own = from_every_process(tree_of({**engine.own, "random": self.random}))
        if not is_main_process():
            return
        state = engine.trainer.state
        tree = {
            "phase": number,
            "iteration": int(state.iteration),
            "minutes": self._minutes(),
            "outcomes": self.outcomes,
            "own": own,
            "parts": tree_of(engine.parts),
        }
        write_state(self.states, number, int(state.iteration), tree)

    def _write_outcome(self, engine: PhaseEngine, hyper_parameters: Mapping[str, Any]) -> None:
        if not is_main_process():
            return
        outcome = run_outcome(self.outcomes, self._minutes())
        figures = figures_of(outcome)
        engine.board.hyper_parameters(hyper_parameters, figures)
        engine.board.close()
        extend_record(self.run_dir, {"outcome": outcome, "watchdogs": self._watch_record(self.outcomes)})
        if self.mlflow is not None:
            self.mlflow.finish(figures)

    def _watch_the_end(self, engine: PhaseEngine, outcome: Mapping[str, Any]) -> None:
        limits = watch_limits(self.settings.thresholds)
        missing = artefacts_at_the_end(self.run_dir, engine.keeper, engine.board, outcome["history"], limits)
        engine.watchdogs.at_the_end(missing, int(outcome["epochs"]))
        engine.board.close()

    def _watch_record(self, phases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        assert self.watchdogs is not None
        return watch_record(phases, self.watchdogs.acknowledged, self.watchdogs.unwatched)

    def _record_findings_of_a_failure(self) -> None:
        """Write what the watchdogs have found into the record of a run that ends without an outcome."""
        has_record = (self.run_dir / "record.json").is_file()
        if self.watchdogs is None or not is_main_process() or not has_record:
            return
        with contextlib.suppress(FiducialError, OSError):  # the failure itself is what the user has to read
            now = {"phase": self.watchdogs.phase, "findings": self.watchdogs.after_failure()}
            ended = [phase for phase in self.outcomes if phase["phase"] != now["phase"]]
            extend_record(self.run_dir, {"watchdogs": self._watch_record([*ended, now])})

    def _minutes(self) -> float:
        return self.minutes_before + (time.monotonic() - self.started) / 60
