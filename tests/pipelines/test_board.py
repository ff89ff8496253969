"""TensorBoard's files: exact counts, curves that can be read back, and no step twice or missing after a kill."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ValidationHandler
from monai.inferers import SimpleInferer
from monai.transforms import AsDiscreted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.plugins.hparams import metadata as hparams_metadata
from torch import nn

from pipelines.inference.inferers import class_probabilities
from pipelines.training.board import (
    THRESHOLDS,
    TensorBoardLog,
    binned_counts,
    hyper_parameters_of,
)
from pipelines.training.validation import ValidationDice
from transforms.errors import DataError

CPU = torch.device("cpu")
COLOURS = {0: "#000000", 1: "#ff0000", 2: "#00ff00"}


def case(name: str, seed: int) -> dict[str, Any]:
    """Three classes at random, and an image that shows them."""
    label = torch.randint(0, 3, (1, 4, 4, 4), generator=torch.Generator().manual_seed(seed))
    return {"image": label.float() + 0.1 * seed, "label": label, "case": name}


class Session:
    """A training in miniature with its log, as one process of a run sees it."""

    def __init__(self, folder: Path, cases: list[dict[str, Any]] | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.network = nn.Conv3d(1, 3, 1)
        self.validator = SupervisedEvaluator(
            device=CPU,
            val_data_loader=DataLoader(cases or [case("v0", 1), case("v1", 2)], batch_size=1),
            network=self.network,
            inferer=SimpleInferer(),
            postprocessing=AsDiscreted("pred", argmax=True),
            key_val_metric={"mean_dice": ValidationDice({1: "core", 2: "rim"})},
        )
        labels = {0: "background", 1: "core", 2: "rim"}
        self.log = TensorBoardLog(
            folder, lambda: {"all": 0.1}, self.validator, COLOURS, **{"labels": labels, **options}
        )

    def trainer(self, epochs: int, handlers: tuple[Any, ...] = ()) -> SupervisedTrainer:
        return SupervisedTrainer(
            device=CPU,
            max_epochs=epochs,
            train_data_loader=DataLoader([case("t0", 3), case("t1", 4)], batch_size=1),
            network=self.network,
            optimizer=torch.optim.SGD(self.network.parameters(), lr=0.1),
            loss_function=lambda logits, label: nn.functional.cross_entropy(logits, label[:, 0].long()),
            decollate=False,
            train_handlers=[ValidationHandler(interval=1, validator=self.validator), self.log, *handlers],
        )


def events(folder: Path) -> list[tuple[str, int]]:
    """Every (tag, step) that any file of the folder holds, in the order of writing: nothing is purged or thinned."""
    found = []
    for path in sorted(folder.glob("events*"), key=lambda p: p.stat().st_mtime_ns):
        for event in LegacyEventFileLoader(str(path)).Load():
            found += [(value.tag, event.step) for value in event.summary.value]
    return found


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0}).Reload()


# ---------------------------------------------------------------------------------------------------------- counting


def test_counts_by_hand() -> None:
    # probability  .1  .5  .5  .9        at t=0: all four positive; at .5: the last three; at .6 and .9: the last
    # truth         0   1   0   1
    probability, truth = torch.tensor([0.1, 0.5, 0.5, 0.9]), torch.tensor([False, True, False, True])
    tp, fp, tn, fn = binned_counts(probability, truth, torch.tensor([0.0, 0.5, 0.6, 0.9])).tolist()
    assert tp == [2, 2, 1, 1]
    assert fp == [2, 1, 0, 0]
    assert tn == [0, 1, 2, 2]
    assert fn == [0, 0, 1, 1]


def test_a_probability_on_a_threshold_counts_at_it() -> None:
    # floor(p * 126), as TensorBoard bins, puts some of the thresholds themselves one bin too low
    tp = binned_counts(THRESHOLDS, torch.ones(127, dtype=torch.bool), THRESHOLDS)[0]
    assert tp.tolist() == list(range(127, 0, -1))


@given(st.lists(st.tuples(st.integers(0, 252), st.booleans()), max_size=40))
@settings(max_examples=40, deadline=None)
def test_counts_are_those_of_brute_force(voxels: list[tuple[int, bool]]) -> None:
    probability = torch.tensor([position / 252 for position, _ in voxels], dtype=torch.float32)  # half of them on edges
    truth = torch.tensor([positive for _, positive in voxels], dtype=torch.bool)
    counts = binned_counts(probability, truth, THRESHOLDS)
    for column, threshold in zip(counts.T.tolist(), THRESHOLDS, strict=True):
        called = probability >= threshold
        pairs = ((called, truth), (called, ~truth), (~called, ~truth), (~called, truth))
        assert column == [int((a & b).sum()) for a, b in pairs]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_probability_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(DataError, match="1 of 2 voxels are not finite"):
        binned_counts(torch.tensor([0.5, value]), torch.tensor([True, False]), THRESHOLDS)


def test_probabilities_of_several_and_of_one_channel() -> None:
    several = class_probabilities(torch.tensor([[0.0, np.log(3.0)]]))
    torch.testing.assert_close(several, torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(class_probabilities(torch.tensor([[np.log(3.0)]])), torch.tensor([[0.75]]))


# ---------------------------------------------------------------------------------------------------------- curves


def curve(folder: Path, name: str, epoch: int) -> np.ndarray:
    """tp, fp, tn, fn, precision, recall at 127 thresholds."""
    tensors = {event.step: event.tensor_proto for event in read(folder).Tensors(f"precision_recall/{name}")}
    return np.array(tensors[epoch].float_val).reshape(6, 127)


def test_curves_are_those_of_the_probabilities_before_the_argmax(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.trainer(epochs=1).run()
    cases = [case("v0", 1), case("v1", 2)]
    with torch.no_grad():  # the validation ran after the last step: the network is still the validated one
        probability = torch.softmax(session.network(torch.stack([c["image"] for c in cases])), dim=1)
    label = torch.stack([c["label"][0] for c in cases])
    for name, value in (("core", 1), ("rim", 2)):
        tp, fp, tn, fn, precision, recall = curve(tmp_path, name, 1)
        called = probability[:, value, ..., None] >= THRESHOLDS
        true = (label == value)[..., None]
        assert tp.tolist() == (called & true).sum((0, 1, 2, 3)).tolist()
        assert fp.tolist() == (called & ~true).sum((0, 1, 2, 3)).tolist()
        assert set(tp + fp + tn + fn) == {2 * 4**3}
        assert set(tp + fn) == {int((label == value).sum())}
        assert precision[0] == pytest.approx(float((label == value).float().mean()))
        assert recall[0] == 1.0
    assert "precision_recall/background" not in read(tmp_path).Tags()["tensors"]


def test_every_validation_counts_anew(tmp_path: Path) -> None:
    Session(tmp_path).trainer(epochs=3).run()
    for epoch in (1, 2, 3):
        assert curve(tmp_path, "core", epoch)[:4].sum(0).tolist() == [128.0] * 127


def test_a_network_of_one_channel_has_a_curve(tmp_path: Path) -> None:
    validator = SupervisedEvaluator(
        device=CPU,
        val_data_loader=DataLoader([{"image": torch.tensor([[-1.0, 0, 2]]), "label": torch.tensor([[0, 0, 1]])}]),
        network=nn.Identity(),
        postprocessing=AsDiscreted("pred", threshold=0.0),
        key_val_metric={"dice": ValidationDice({1: "core"})},
    )
    engine = Engine(lambda engine, batch: {"loss": torch.tensor(1.0)})
    ValidationHandler(interval=1, validator=validator).attach(engine)
    TensorBoardLog(tmp_path, lambda: {"all": 0.1}, validator, COLOURS, {1: "core"}, overlay_cases=0).attach(engine)
    engine.run([0])
    tp, fp, *_ = curve(tmp_path, "core", 1)
    # sigmoid: .27, .5, .88; threshold 63 is .5
    assert (tp[0], tp[110], tp[111]) == (1, 1, 0)
    assert (fp[0], fp[63], fp[64]) == (2, 1, 0)


def test_a_case_with_nan_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = case("broken", 5)
    bad["image"][0, 0, 0, 0] = float("nan")
    with caplog.at_level(logging.WARNING, logger="pipelines.training.board"):
        Session(tmp_path, [case("v0", 1), bad]).trainer(epochs=1).run()
    assert "case broken is left out of the precision-recall curves: 1 of 64 voxels" in caplog.text
    assert set(curve(tmp_path, "core", 1)[:4].sum(0)) == {64.0}


# ---------------------------------------------------------------------------------------------------------- the files


def test_nothing_is_opened_before_the_engine_starts(tmp_path: Path) -> None:
    session = Session(tmp_path)
    trainer = session.trainer(epochs=1)
    assert list(tmp_path.iterdir()) == []
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda _: names.extend(tmp_path.iterdir()))
    names: list[Path] = []
    trainer.run()
    assert len(names) == 1


def test_a_log_is_deaf_to_the_validations_of_the_next_phase(tmp_path: Path) -> None:
    session = Session(tmp_path / "1")
    first = session.log
    session.trainer(epochs=1).run()
    before = first.state_dict()
    session.log = TensorBoardLog(tmp_path / "2", lambda: {"all": 0.1}, session.validator, COLOURS, {1: "core"})
    session.trainer(epochs=2).run()
    assert first.state_dict() == before
    assert ("overlay/v0/middle", 2) in events(tmp_path / "2")
    assert curve(tmp_path / "2", "core", 1)[:4].sum(0).tolist() == [128.0] * 127


def test_only_the_active_process_writes(tmp_path: Path) -> None:
    session = Session(tmp_path, active=False)
    others = tmp_path / "events.out.tfevents.1"
    others.write_bytes(b"of the main process")
    session.trainer(epochs=1).run()
    session.log.hyper_parameters({"seed": 0}, {"dice": 1.0})
    assert session.log.state_dict() == {"files": {}}
    session.log.load_state_dict({"files": {}})
    assert list(tmp_path.iterdir()) == [others]
    assert others.read_bytes() == b"of the main process"


class Killed(BaseException):
    """What a process does not survive."""


class KeepState:
    """Keeps the log's state after every epoch, and dies in the middle of the third."""

    def __init__(self, log: TensorBoardLog) -> None:
        self.log, self.state = log, dict[str, Any]()

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.keep)
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), self.die)

    def keep(self, engine: Engine) -> None:
        self.state = {"engine": engine.state.epoch, "log": self.log.state_dict()}

    def die(self, engine: Engine) -> None:
        raise Killed


def test_a_resumed_run_has_every_event_once(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    Session(whole).trainer(epochs=5).run()

    first = Session(broken)
    keeper = KeepState(first.log)
    with pytest.raises(Killed):
        first.trainer(epochs=5, handlers=(keeper,)).run()
    assert ("loss/step", 5) in events(broken)  # written after the state was kept
    assert keeper.state["engine"] == 2
    stray = broken / "events.out.tfevents.9999999999.other.1.0"  # of an attempt that died before its first state
    stray.write_bytes(b"")

    second = Session(broken)
    second.log.load_state_dict(keeper.state["log"])
    assert ("loss/step", 5) not in events(broken)
    assert not stray.exists()
    trainer = second.trainer(epochs=5)
    trainer.state.epoch, trainer.state.iteration = 2, 4
    trainer.load_state_dict({"epoch_length": 2, "max_epochs": 5, "iteration": 4})
    trainer.run()

    assert events(broken) == events(whole)
    assert len(set(events(whole))) == len(events(whole))
    steps = [step for tag, step in events(broken) if tag == "loss/step"]
    assert steps == list(range(1, 11))


def test_a_state_inside_an_epoch_counts_too(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, lambda: {"all": 0.1}, None, COLOURS)
    for step in (1, 2):
        log.writer.add_scalar("loss/step", 1.0, step)
    state = log.state_dict()  # nothing was flushed by anyone else
    log.writer.add_scalar("loss/step", 1.0, 3)
    log.close()
    assert [step for _, step in events(tmp_path)] == [1, 2, 3]
    log.load_state_dict(state)
    assert [step for _, step in events(tmp_path)] == [1, 2]
    assert log.state_dict() == state


def test_files_that_are_missing_or_short_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "events.out.tfevents.1").write_bytes(b"123")
    log = TensorBoardLog(tmp_path, lambda: {"all": 0.1}, None, COLOURS)
    with caplog.at_level(logging.WARNING, logger="pipelines.training.board"):
        log.load_state_dict({"files": {"events.out.tfevents.1": 5, "events.out.tfevents.2": 7}})
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "3 of 5 bytes are left; TensorBoard has a gap",
        "0 of 7 bytes are left; TensorBoard has a gap",
    ]
    assert (tmp_path / "events.out.tfevents.1").read_bytes() == b"123"


# ---------------------------------------------------------------------------------------------------------- the table


def test_hyper_parameters_stand_in_the_run_itself(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.trainer(epochs=1).run()
    values = {"learning_rate": 0.002, "loss_name": "dice_ce", "spacing": [1.0, 1.0, 3.0], "fold": None, "check": True}
    session.log.hyper_parameters(values, {"best_metric": 0.75, "epochs": 1})
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []  # torch would make a run of its own
    board = read(tmp_path)
    contents = {
        tag: hparams_metadata.parse_session_start_info_plugin_data(content)
        for tag, content in board.PluginTagToContent("hparams").items()
        if tag == hparams_metadata.SESSION_START_INFO_TAG
    }
    shown = contents[hparams_metadata.SESSION_START_INFO_TAG].hparams
    assert shown["learning_rate"].number_value == 0.002
    assert shown["loss_name"].string_value == "dice_ce"
    assert shown["spacing"].string_value == "[1.0, 1.0, 3.0]"
    assert shown["fold"].string_value == "None"
    assert shown["check"].number_value == 1
    experiment = hparams_metadata.parse_experiment_plugin_data(
        board.PluginTagToContent("hparams")[hparams_metadata.EXPERIMENT_TAG]
    )
    assert {info.name.tag for info in experiment.metric_infos} == {"final/best_metric", "final/epochs"}
    assert hparams_metadata.SESSION_END_INFO_TAG in board.PluginTagToContent("hparams")
    assert [event.value for event in board.Scalars("final/best_metric")] == [0.75]


def test_hyper_parameters_of_a_configuration() -> None:
    config = {
        "imports": ["$import transforms"],
        "manifest": "cohort.json",
        "spacing": [1.0, 2.0],
        "fold": None,
        "patch_size": "$[16, 16]",
        "network_def": {"_target_": "DynUNet"},
        "bundle_root": ".",
        "bundle_name": "lesion",
    }
    assert hyper_parameters_of(config) == {"manifest": "cohort.json", "spacing": [1.0, 2.0], "fold": None}
    assert hyper_parameters_of({"seed": 0, "net": "@x"}) == {"seed": 0}


def test_several_groups_have_a_curve_each(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, lambda: {"decoder": 0.1, "encoder|stem": 0.01}, None, COLOURS)
    engine = Engine(lambda e, b: {"loss": torch.tensor(1.0)})
    log.attach(engine)
    engine.run([0, 0])
    tags = {tag for tag, _ in events(tmp_path)}
    assert {"learning_rate/decoder", "learning_rate/encoder_stem"} <= tags
    assert "learning_rate" not in tags
