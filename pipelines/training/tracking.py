"""MLflow as an optional second log of a run, beside TensorBoard: parameters, figures per epoch, final documents.

MONAI's ``MLFlowHandler`` is not used: it finds a run again by its name, lets an environment variable overrule the
configured store, and writes a resumed epoch twice. Here the run's id is part of its state, and a step that the store
already has is not written again. Nothing is sent to anybody but the configured store: MLflow's own reports are off.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ignite.engine import Engine, Events

from pipelines.training.handlers import validated_metric
from transforms.errors import BundleError, ResourceError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

DOCUMENTS = ("record.json", "config.yaml")
LONGEST_VALUE = 6000  # characters that MLflow keeps of a parameter
_NOT_IN_A_NAME = re.compile(r"[^\w\-./: ]", re.ASCII)


def store_uri(uri: str, runs_dir: str | Path) -> str:
    """Return the tracking URI that ``uri`` stands for: ``sqlite`` is ``mlflow.db`` in ``runs_dir``, empty is off.

    Raises:
        BundleError: a folder (``file:`` or a plain path), which MLflow gave up in favour of databases.
    """
    if uri == "sqlite":
        return f"sqlite:///{(Path(runs_dir).resolve() / 'mlflow.db').as_posix()}"
    if not uri:
        return ""
    if uri.startswith("file:") or "://" not in uri:
        raise BundleError(
            f"mlflow_uri {uri!r}",
            "MLflow no longer writes into folders; a database or a server is expected",
            "write sqlite (a file in runs_dir), sqlite:////absolute/path/mlflow.db, or http://server:5000",
        )
    return uri


class MlflowLog:
    """Write a training run to MLflow: experiment = name of the bundle, run = name of the run.

    One log serves all phases of a run. Before each of several, set ``phase`` to its name: the figures' names begin with
    it.

    Args:
        run_dir: the run's folder, ``<runs_dir>/<bundle>/<name>``.
        tracking_uri: of ``store_uri``.
        params: the hyper-parameters, see ``hyper_parameters_of``.
        validator: the evaluator whose metrics are written as ``validation/*``, or None.
        active: whether anything is written; one process of a run does.

    Raises:
        BundleError: MLflow is not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        tracking_uri: str,
        params: Mapping[str, Any],
        validator: Engine | None = None,
        active: bool = True,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.tracking_uri = tracking_uri
        self.params = dict(params)
        self.validator = validator
        self.active = active
        self.run_id: str | None = None
        self.phase = ""  # where a run has several: the epochs of each are counted anew
        self._client: MlflowClient | None = None
        self._known: dict[str, set[int]] = {}  # steps that the store has, per metric of a resumed run
        self._resumed = False
        self._pending: list[Metric] = []
        if active:
            _import_quietly()

    def attach(self, engine: Engine) -> None:
        """Register on the trainer, after the validation and ``AverageLoss``."""
        if self.active:
            engine.add_event_handler(Events.STARTED, lambda _: self.start())
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the id of MLflow's run."""
        return {"run_id": self.run_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on writing into that run, before the engine starts."""
        self.run_id = state["run_id"]
        self._resumed = self.run_id is not None

    def start(self) -> None:
        """Open the store; make a run there, or go on with the one of the state. Once is enough for several engines.

        Raises:
            ResourceError: the store cannot be opened.
        """
        if self._client is not None:
            return
        from mlflow import MlflowClient

        try:
            self._client = MlflowClient(tracking_uri=self.tracking_uri)
            if self.run_id is not None and not self._continued():
                self.run_id, self._resumed = None, False
            if self.run_id is None:
                self._create()
        except Exception as problem:  # of SQL, of the network or of MLflow, according to the store
            raise ResourceError(
                f"mlflow_uri {self.tracking_uri}: cannot be opened",
                str(problem).splitlines()[0],
                "check address and permissions, or leave mlflow_uri empty",
            ) from problem

    def finish(self, metrics: Mapping[str, float], status: str = "FINISHED") -> None:
        """Write final figures and the run's documents, and close MLflow's run.

        Args:
            metrics: name -> value, written as ``final/<name>``.
            status: ``FINISHED``, or ``FAILED`` for a run that ended with an error.
        """
        if self._client is None or self.run_id is None:
            return
        self._send({f"final/{name}": float(value) for name, value in metrics.items()}, step=0)
        try:
            for name in DOCUMENTS:
                if (self.run_dir / name).is_file():
                    self._client.log_artifact(self.run_id, str(self.run_dir / name))
            self._client.set_terminated(self.run_id, status)
        except Exception as problem:
            logger.warning("MLflow has not taken the end of the run: %s", problem)

    def _create(self) -> None:
        assert self._client is not None
        name = self.run_dir.parent.name
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name, self._artifacts())
        tags = {"run_dir": str(self.run_dir.resolve()), "checkpoints": str(self.run_dir.resolve() / "checkpoints")}
        self.run_id = str(self._client.create_run(number, run_name=self.run_dir.name, tags=tags).info.run_id)
        for key, value in self.params.items():
            self._client.log_param(self.run_id, _name(key), str(value)[:LONGEST_VALUE])

    def _continued(self) -> bool:
        """Return whether the store has the run, and mark it as running again."""
        from mlflow.exceptions import MlflowException

        assert self._client is not None
        try:
            self._client.update_run(self.run_id, status="RUNNING")
        except MlflowException as problem:
            if problem.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            logger.warning("MLflow has no run %s any more; another one is made", self.run_id)
            return False
        return True

    def _artifacts(self) -> str | None:
        """Return where documents go: beside the database; by default MLflow would take the working directory."""
        if not self.tracking_uri.startswith("sqlite:///"):
            return None
        return (Path(self.tracking_uri.removeprefix("sqlite:///")).resolve().parent / "mlflow_artifacts").as_uri()

    def _epoch(self, engine: Engine) -> None:
        epoch = int(engine.state.epoch)
        figures = {"loss" if n == "loss" else f"loss/{n}": float(v) for n, v in engine.state.metrics.items()}
        if self.validator is not None and validated_metric(self.validator, epoch) is not None:
            figures |= {f"validation/{n}": float(v) for n, v in self.validator.state.metrics.items()}
        self._send({f"{self.phase}/{name}" if self.phase else name: value for name, value in figures.items()}, epoch)

    def _send(self, figures: Mapping[str, float], step: int) -> None:
        """Send what the store does not have yet; what it does not take now goes with the next epoch."""
        from mlflow.entities import Metric

        assert self._client is not None
        now = int(time.time() * 1000)
        self._pending += [Metric(_name(key), value, now, step) for key, value in figures.items()]
        try:
            new = [metric for metric in self._pending if metric.step not in self._steps_in_store(metric.key)]
            self._client.log_batch(self.run_id, metrics=new)
            self._pending = []
        except Exception as problem:  # a log must not end a training
            logger.warning("MLflow has not taken the figures of step %d, they are kept: %s", step, problem)

    def _steps_in_store(self, key: str) -> set[int]:
        """Return the steps that were written before the run was resumed: those between its state and the kill."""
        if self._resumed and key not in self._known:
            assert self._client is not None
            self._known[key] = {metric.step for metric in self._client.get_metric_history(self.run_id, key)}
        return self._known.get(key, set())


def _name(text: str) -> str:
    return _NOT_IN_A_NAME.sub("_", text)


def _import_quietly() -> None:
    """Import MLflow without its usage reports and without the messages of its database's migrations.

    Raises:
        BundleError: it is not installed.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        import mlflow  # noqa: F401
    except ImportError as problem:
        raise BundleError(
            "mlflow_uri: MLflow is not installed",
            str(problem),
            "pip install 'fiducial[mlflow]', or leave mlflow_uri empty",
        ) from problem
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
