"""MLflow beside TensorBoard: what is written can be read back, once, also after a kill; folders are refused."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ignite.engine import Engine, Events

from pipelines.training.tracking import MlflowLog, store_uri
from transforms.errors import BundleError, ResourceError

PARAMS = {"learning_rate": 0.002, "spacing": [1.0, 1.0, 3.0], "loss_name": "dice_ce"}


@pytest.mark.parametrize("uri", ["file:///data/mlruns", "file:mlruns", "mlruns", "/data/mlruns"])
def test_folders_are_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no longer writes into folders") as caught:
        store_uri(uri, tmp_path)
    assert uri in caught.value.what


def test_stores(tmp_path: Path) -> None:
    assert store_uri("sqlite", tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    for uri in ("sqlite:////data/mlflow.db", "http://server:5000", "postgresql://host/db"):
        assert store_uri(uri, tmp_path) == uri


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)  # Python takes None for "not there"
    with pytest.raises(BundleError, match="MLflow is not installed") as caught:
        MlflowLog(tmp_path, "sqlite:///x.db", {})
    assert "fiducial[mlflow]" in caught.value.fix


def test_other_processes_do_not_even_import_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    log = MlflowLog(tmp_path, "sqlite:///x.db", {}, active=False)
    play(log, epochs=1)
    log.finish({"dice": 1.0})
    assert log.state_dict() == {"run_id": None}


# ------------------------------------------------------------------------------------------- what needs the package


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs whose store is made once: making it takes some seconds."""
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("runs")
    play(MlflowLog(folder / "warm_up" / "a", store_uri("sqlite", folder), {}), epochs=0)
    return folder


class Validator(SimpleNamespace):
    """Validates every second epoch, with a metric whose name MLflow would not take."""

    def __init__(self) -> None:
        super().__init__(state=SimpleNamespace(epoch=0, metrics={}, key_metric_name="mean_dice"))

    def run(self, epoch: int) -> None:
        metrics = {"mean_dice": epoch / 10, "dice_lésion (T2)": float("nan")}
        self.state = SimpleNamespace(epoch=epoch, metrics=metrics, key_metric_name="mean_dice")


def play(log: MlflowLog, epochs: int, first: int = 1) -> None:
    """The epochs ``first`` to ``epochs`` of a run whose loss in epoch n is 1/n."""

    def step(engine: Engine) -> None:
        epoch = engine.state.epoch
        if epoch % 2 == 0 and log.validator is not None:
            log.validator.run(epoch)
        engine.state.metrics = {"loss": 1 / epoch, "ce": 0.5 / epoch}

    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(Events.EPOCH_COMPLETED, step)
    log.attach(engine)
    engine.load_state_dict({"epoch_length": 1, "max_epochs": max(epochs, 1), "iteration": first - 1})
    if epochs:
        engine.run([0], max_epochs=epochs)
    elif log.active:
        log.start()


def new_log(runs_dir: Path, name: str, **options: Any) -> MlflowLog:
    (runs_dir / "lesions" / name).mkdir(parents=True, exist_ok=True)
    return MlflowLog(runs_dir / "lesions" / name, store_uri("sqlite", runs_dir), PARAMS, Validator(), **options)


def client(runs_dir: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store_uri("sqlite", runs_dir))


def history(runs_dir: Path, run_id: str | None, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client(runs_dir).get_metric_history(run_id, key)]


def test_a_run_can_be_read_back(runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://nowhere.invalid")  # what is configured counts
    log = new_log(runs_dir, "one")
    play(log, epochs=4)
    (log.run_dir / "record.json").write_text('{"outcome": 1}')
    (log.run_dir / "config.yaml").write_text("seed: 0")
    log.finish({"best_metric": 0.4})

    run = client(runs_dir).get_run(log.run_id)
    assert client(runs_dir).get_experiment(run.info.experiment_id).name == "lesions"
    assert (run.info.run_name, run.info.status) == ("one", "FINISHED")
    assert run.data.params == {"learning_rate": "0.002", "spacing": "[1.0, 1.0, 3.0]", "loss_name": "dice_ce"}
    assert run.data.tags["run_dir"] == str(log.run_dir)
    assert history(runs_dir, log.run_id, "loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 0.25)]
    assert history(runs_dir, log.run_id, "loss/ce")[0] == (1, 0.5)
    assert history(runs_dir, log.run_id, "validation/mean_dice") == [(2, 0.2), (4, 0.4)]
    assert "validation/dice_l_sion _T2_" in run.data.metrics
    assert history(runs_dir, log.run_id, "final/best_metric") == [(0, 0.4)]
    documents = {artifact.path for artifact in client(runs_dir).list_artifacts(log.run_id)}
    assert documents == {"record.json", "config.yaml"}
    assert list((runs_dir / "mlflow_artifacts").rglob("record.json"))
    assert list(tmp_path.iterdir()) == []  # MLflow's own default is the working directory


def test_a_resumed_run_is_the_same_and_has_no_step_twice(runs_dir: Path) -> None:
    log = new_log(runs_dir, "resumed")
    play(log, epochs=2)
    state = log.state_dict()
    play(log, epochs=4, first=3)  # written, then killed before the state was

    again = new_log(runs_dir, "resumed")
    again.load_state_dict(state)
    play(again, epochs=6, first=3)
    again.finish({"best_metric": 0.6})

    assert again.run_id == log.run_id
    assert [step for step, _ in history(runs_dir, log.run_id, "loss")] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in history(runs_dir, log.run_id, "validation/mean_dice")] == [2, 4, 6]
    experiment = client(runs_dir).get_experiment_by_name("lesions").experiment_id
    names = [run.info.run_name for run in client(runs_dir).search_runs([experiment])]
    assert names.count("resumed") == 1


def test_phases_do_not_overwrite_one_another(runs_dir: Path) -> None:
    log = new_log(runs_dir, "phases")
    for log.phase in ("head", "all"):
        play(log, epochs=2)
    assert [step for step, _ in history(runs_dir, log.run_id, "head/loss")] == [1, 2]
    assert [step for step, _ in history(runs_dir, log.run_id, "all/validation/mean_dice")] == [2]


def test_a_run_that_the_store_has_lost_is_made_anew(runs_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = new_log(runs_dir, "lost")
    log.load_state_dict({"run_id": "0" * 32})
    with caplog.at_level(logging.WARNING, logger="pipelines.training.tracking"):
        play(log, epochs=1)
    assert "has no run 0000" in caplog.text
    assert log.run_id != "0" * 32
    assert history(runs_dir, log.run_id, "loss") == [(1, 1.0)]


def test_a_store_that_fails_for_a_while_loses_nothing(
    runs_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = new_log(runs_dir, "flaky")
    play(log, epochs=1)
    monkeypatch.setattr(log._client, "log_batch", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("down")))
    with caplog.at_level(logging.WARNING, logger="pipelines.training.tracking"):
        play(log, epochs=2, first=2)
    assert "has not taken the figures of step 2" in caplog.text
    monkeypatch.undo()
    play(log, epochs=3, first=3)
    assert [step for step, _ in history(runs_dir, log.run_id, "loss")] == [1, 2, 3]


def test_a_failed_run_says_so(runs_dir: Path) -> None:
    log = new_log(runs_dir, "failed")
    play(log, epochs=1)
    log.finish({}, status="FAILED")
    assert client(runs_dir).get_run(log.run_id).info.status == "FAILED"


def test_a_store_that_cannot_be_opened_is_an_error_at_the_start(runs_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database, it is a text")
    with pytest.raises(ResourceError, match="cannot be opened"):
        play(MlflowLog(tmp_path / "b" / "r", store_uri("sqlite", tmp_path), {}), epochs=1)


def test_no_usage_reports(runs_dir: Path) -> None:
    from mlflow.environment_variables import MLFLOW_DISABLE_TELEMETRY

    assert MLFLOW_DISABLE_TELEMETRY.get() is True
