"""The watchdogs of a run: said once, written down; an error ends it after its state is saved; resuming is exact."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.engines.utils import IterationEvents
from monai.utils import set_determinism
from small_runs import small_run, validation_cases, weights_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

from pipelines.cli import main
from pipelines.explain import report
from pipelines.losses import supervised_loss
from pipelines.manifests import Manifest
from pipelines.preflight import Finding
from pipelines.preflight.battery import with_thresholds
from pipelines.preflight.rules import RULES
from pipelines.preflight.watch import LIMITS, WATCHED
from pipelines.training import TrainingRun, ValidationDice
from pipelines.training.faults import NonFiniteSteps
from pipelines.training.state import newest_state
from pipelines.training.validation_watchers import sample_digest
from pipelines.training.watchdogs import Watchdogs, acknowledged_rules, watch_limits
from pipelines.training.watchers import Watcher, WatchFaults, WatchGradient, dice_of_terms
from transforms.errors import BundleError, DataError, InterruptedRun, UsageError

PLAN = {"rates": {".*": 0.02}, "max_epochs": 8, "steps_per_epoch": 5}
ADAMW = {"optimizer": torch.optim.AdamW}


@pytest.fixture(autouse=True)
def undetermined() -> Iterator[None]:
    """Leave no seeds to the tests of other files."""
    yield
    set_determinism(None)


class EverythingIsBox(nn.Module):
    """A loss that rewards one answer."""

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, torch.ones_like(label[:, 0]).long())


def make(folder: Path, plan: dict[str, Any] | None = None, **changes: Any) -> TrainingRun:
    """A run with a record, as a bundle leaves it before the training."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("record.json", "{}"), ("config.yaml", "seed: 0\n")):
        if not (folder / name).exists():
            (folder / name).write_text(text)
    return small_run(folder, plan={**PLAN, **(plan or {})}, **{"cases": validation_cases(2), **ADAMW, **changes})


def collapsing(folder: Path, **changes: Any) -> TrainingRun:
    return make(folder, loss=lambda name: EverythingIsBox(), **changes)


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


def found_in(folder: Path) -> list[tuple[str, int, int]]:
    entries = record_of(folder)["watchdogs"]["findings"]
    return [(entry["rule"], entry["first_epoch"], entry["last_epoch"]) for entry in entries]


# ------------------------------------------------------------------------------------------------------- a whole run


def test_a_healthy_run_has_no_finding_and_says_what_nothing_watched(tmp_path: Path) -> None:
    run = make(tmp_path / "r", {"patience": 20, "steps_per_epoch": 15})
    run.run()
    watched = record_of(tmp_path / "r")["watchdogs"]
    assert watched["findings"] == []
    assert watched["acknowledged"] == {}
    assert set(watched["not_watched"]) == {"R33", "R44"}
    assert "findings" not in record_of(tmp_path / "r")["outcome"]


def test_without_validation_the_record_says_which_rules_had_nothing_to_look_at(tmp_path: Path) -> None:
    make(tmp_path / "r", {"max_epochs": 1}, cases=[]).run()
    unwatched = record_of(tmp_path / "r")["watchdogs"]["not_watched"]
    assert {unwatched[rule] for rule in ("R31", "R32", "R34", "R36", "R39", "R43")} == {"no validation cases"}


def test_a_collapse_ends_the_run_after_its_state_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # epochs 1 to 5 may know nothing; in 6 and 7 everything is box
    with pytest.raises(BundleError, match=r"R31: the prediction is box everywhere, since epoch 7") as caught:
        collapsing(tmp_path / "r").run()
    assert "--acknowledge \"['R31: why']\"" in caught.value.fix
    assert report(caught.value) == 4
    assert "box everywhere" in capsys.readouterr().err
    found = newest_state(tmp_path / "r" / "checkpoints")
    assert found is not None
    assert found[1]["iteration"] == 7 * 5
    assert "outcome" not in record_of(tmp_path / "r")  # so that it can be resumed
    assert ("R31", 7, 7) in found_in(tmp_path / "r")


def test_an_acknowledged_collapse_is_reported_and_goes_on(tmp_path: Path) -> None:
    collapsing(tmp_path / "r", acknowledge=["R31: a test of one answer", "R09: of the preflight"]).run()
    record = record_of(tmp_path / "r")
    assert record["outcome"]["epochs"] == 8
    assert record["watchdogs"]["acknowledged"] == {"R31": "a test of one answer"}
    assert ("R31", 7, 8) in found_in(tmp_path / "r")
    (entry,) = [each for each in record["watchdogs"]["findings"] if each["rule"] == "R31"]
    assert entry["acknowledged"] == "a test of one answer"
    assert entry["severity"] == "error"


def test_a_run_that_was_ended_goes_on_when_the_finding_is_acknowledged(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    with pytest.raises(BundleError, match="R31"):
        collapsing(folder).run()
    with pytest.raises(BundleError, match="R31"):  # nothing has changed, and it was the last epoch but one
        collapsing(folder).run()
    with pytest.raises(BundleError, match="R31"):  # nor does a run pass that has only its outcome left to write
        collapsing(folder).run()
    assert "outcome" not in record_of(folder)
    collapsing(folder, acknowledge=["R31: known"]).run()
    assert record_of(folder)["outcome"]["epochs"] == 8
    assert ("R31", 7, 8) in found_in(folder)


def test_a_finding_is_said_once_and_stands_in_the_log_of_tensorboard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        make(tmp_path / "r", {"max_epochs": 4}, cases=[validation_cases(1)[0]] * 2).run()
    said = [each.getMessage() for each in caplog.records if "R32" in each.getMessage()]
    assert len(said) == 1
    assert "all validation samples are the same one" in said[0]
    assert ("R32", 1, 4) in found_in(tmp_path / "r")
    board = EventAccumulator(str(tmp_path / "r" / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    (event,) = board.Tensors("watchdogs/R32/text_summary")
    assert event.step == 1
    assert "the same one" in event.tensor_proto.string_val[0].decode()


def test_findings_of_every_phase_are_in_the_record(tmp_path: Path) -> None:
    same = [validation_cases(1)[0]] * 2
    make(tmp_path / "r", {"max_epochs": 1}, cases=same, phases=[{"name": "head"}, {"name": "all"}]).run()
    entries = record_of(tmp_path / "r")["watchdogs"]["findings"]
    assert [entry["phase"] for entry in entries if entry["rule"] == "R32"] == ["head", "all"]
    assert all("findings" not in phase for phase in record_of(tmp_path / "r")["outcome"]["phases"])


def test_three_steps_that_are_not_finite_are_a_finding_of_the_record(tmp_path: Path) -> None:
    class Spoilt(EverythingIsBox):
        def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            return super().forward(logits, label) * float("nan")

    with pytest.raises(DataError, match="for the third time"):
        make(tmp_path / "r", loss=lambda name: Spoilt()).run()
    (entry,) = record_of(tmp_path / "r")["watchdogs"]["findings"]
    assert (entry["rule"], entry["severity"], entry["measured"]) == ("R30", "error", "3 of 3 steps")


def test_a_threshold_of_the_user_counts(tmp_path: Path) -> None:
    make(tmp_path / "r", {"max_epochs": 1}, thresholds=["R36.gap=-9", "R36.validations=1", "R01.ratio=3"]).run()
    assert "R36" in [rule for rule, _, _ in found_in(tmp_path / "r")]
    with pytest.raises(UsageError, match=r"(?s)R36\.gap.*no number"):
        watch_limits(["R36.gap=wide"])
    # a limit that nobody has is refused before training, where the limits of all rules are known
    with pytest.raises(UsageError, match=r"R36\.gapp"):
        with_thresholds(RULES, ["R36.gapp=1"], further=WATCHED)


@pytest.mark.parametrize(("record", "number"), [('{"command": ["train"]}', 1), ('{"outcome": {}}', 0)])
def test_a_configuration_that_is_gone_is_missed_where_a_bundle_has_written_one(
    tmp_path: Path, record: str, number: int
) -> None:
    run = make(tmp_path / "r", {"max_epochs": 1})
    (tmp_path / "r" / "record.json").write_text(record)
    (tmp_path / "r" / "config.yaml").unlink()
    run.run()
    missing = [entry["what"] for entry in record_of(tmp_path / "r")["watchdogs"]["findings"] if entry["rule"] == "R42"]
    assert missing == ["config.yaml is missing"] * number


class StopAt:
    """Asks the run to stop after a step, as a cluster does."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(once=self.iteration), lambda _: os.kill(os.getpid(), signal.SIGTERM)
        )


def test_a_resumed_run_goes_on_counting_bit_for_bit(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"acknowledge": ["R31: known"], "thresholds": ["R27.steps=30"], "dropout": 0.5}
    whole = collapsing(tmp_path / "whole", **changes)
    whole.run()
    with pytest.raises(InterruptedRun):
        collapsing(tmp_path / "cut", **changes, handlers=[StopAt(6 * 5 + 2)]).run()
    resumed = collapsing(tmp_path / "cut", **changes)
    resumed.run()
    assert whole.watchdogs is not None
    assert resumed.watchdogs is not None
    assert ("R31", 7, 8) in found_in(tmp_path / "cut")
    assert found_in(tmp_path / "cut") == found_in(tmp_path / "whole")
    assert resumed.watchdogs.state_dict() == whole.watchdogs.state_dict()
    pairs = zip(weights_of(whole).values(), weights_of(resumed).values(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_watching_changes_no_weight(tmp_path: Path) -> None:
    """Collecting draws nothing and adds nothing to a gradient."""
    weights = []
    for name, labels in (("with", {1: "box"}), ("without", {})):  # without labels no gradient is looked at
        run = make(tmp_path / name, {"max_epochs": 2}, dropout=0.5, labels=labels)
        run.run()
        weights.append(weights_of(run))
    assert all(torch.equal(one, two) for one, two in zip(*(each.values() for each in weights), strict=True))


# --------------------------------------------------------------------------------------------------------- the sink


class Says(Watcher):
    """Says what the test wants."""

    def __init__(self) -> None:
        self.next: list[Finding] | None = []

    def judge(self, engine: Engine) -> list[Finding] | None:
        return self.next


def finding(measured: str, severity: Any = "warn") -> Finding:
    return Finding("R39", severity, "lesion too often", measured, "less", "weights", "weight it down")


def test_what_is_over_and_comes_back_is_said_again(caplog: pytest.LogCaptureFixture) -> None:
    watcher = Says()
    dogs = Watchdogs([watcher], "train")
    engine = Engine(lambda engine, batch: None)
    for epoch, now in enumerate([[finding("a")], [finding("b")], None, [], [finding("c")], [finding("d", "error")]], 1):
        watcher.next, engine.state.epoch = now, epoch
        dogs(engine)
    said = [each.getMessage() for each in caplog.records]
    assert [text.split("; ")[1].split(",")[0] for text in said] == ["a", "c", "d"]
    (entry,) = dogs.record()
    assert (entry["first_epoch"], entry["last_epoch"], entry["measured"]) == (1, 6, "d")
    with pytest.raises(BundleError, match="R39"):  # it has become an error
        dogs.raise_if_stopping()
    watcher.next = []
    dogs(engine)
    dogs.raise_if_stopping()  # and is over


def test_acknowledgements_of_the_preflight_are_not_ours() -> None:
    assert acknowledged_rules(["R31: one: answer", "R09: infants", "R36"]) == {"R31": "one: answer"}


# ------------------------------------------------------------------------------------------------------- what is seen


def test_voxels_per_class_and_the_best_constant_by_hand() -> None:
    # case        1          2             lesion: predicted 3 + 1, true 2 + 0, both 2
    # P        11100000   00000001         core:   predicted 0,     true 1,     both 0
    # R        01100020   00000000         background: predicted 5 + 7, true 5 + 8, both 4 + 7
    metric = ValidationDice({1: "lesion", 2: "core"})
    for prediction, reference in (("11100000", "01100020"), ("00000001", "00000000")):
        maps = [torch.tensor([[int(digit) for digit in text]]) for text in (prediction, reference)]
        metric.update([{"pred": maps[0], "label": maps[1]}])
    metric.completed(Engine(lambda engine, batch: None), "mean_dice")
    lesion, core, background = (metric.class_voxels[name] for name in ("lesion", "core", "background"))
    assert (lesion.predicted, lesion.truth, lesion.hit, lesion.valid) == (4, 2, 2, 16)
    assert (core.predicted, core.truth, core.hit) == (0, 1, 0)
    assert (background.predicted, background.truth, background.hit) == (12, 13, 11)
    assert lesion.dice == pytest.approx((2 * 2 / 5 + 0) / 2)
    assert background.dice is None
    # lesion everywhere: 2 * 2 / (2 + 8) in the first case, 0 in the second, and 0 for core
    assert lesion.constant_dice == pytest.approx(0.4 / 2)
    assert core.constant_dice == pytest.approx(2 / 9 / 2)
    assert metric.trivial == pytest.approx(0.2 / 2)


def test_the_best_constant_is_what_the_metric_gives_it() -> None:
    """Compared with predicting each label everywhere; the second label is absent from every case."""
    labels = {1: "a", 2: "b", 3: "c"}
    draw = torch.Generator().manual_seed(0)
    cases = [torch.randint(0, 2, (1, 6, 5), generator=draw) * torch.tensor([1, 3])[number % 2] for number in range(4)]

    def score(value: int | None) -> ValidationDice:
        metric = ValidationDice(labels)
        for case in cases:
            metric.update([{"pred": case if value is None else torch.full_like(case, value), "label": case}])
        return metric

    metric = score(None)
    metric.completed(Engine(lambda engine, batch: None), "mean_dice")
    assert metric.trivial == pytest.approx(max(score(value).compute() for value in (0, 1, 2, 3)))


@pytest.mark.parametrize(("name", "expected"), [("dice_ce", 0.7), ("log_cosh_dice_focal", 0.7)])
def test_the_dice_of_the_training_is_read_from_its_loss(name: str, expected: float) -> None:
    # one voxel of foreground in a probability p everywhere: Dice = 2 p / (1 + p) = 0.7 for p = 7 / 13
    logit = float(np.log(7 / 6))
    loss = supervised_loss(name)
    loss(torch.tensor([0.0, logit]).reshape(1, 2, 1, 1, 1), torch.ones(1, 1, 1, 1, 1))
    terms = {key: float(value) for key, value in loss.last_terms.items()}
    assert dice_of_terms(terms) == pytest.approx(expected, abs=1e-4)
    assert dice_of_terms({"ce": 1.0}) is None


def test_a_digest_is_of_values_and_shape() -> None:
    image = torch.arange(24.0).reshape(2, 3, 4)
    assert sample_digest([image]) == sample_digest([MetaTensor(image.clone())]) == sample_digest([image.half()])
    assert sample_digest([image]) != sample_digest([image.reshape(3, 2, 4)])
    assert sample_digest([image]) != sample_digest([image + 1])
    assert sample_digest([image]) != sample_digest([image, image])
    big = torch.zeros(64, 64, 64)
    shifted = big.clone()
    big[20:40], shifted[21:41] = 1, 1
    assert sample_digest([big]) != sample_digest([shifted])


@pytest.mark.parametrize("heads", [0, 2])
def test_the_gradient_is_shared_among_the_classes_of_the_truth(heads: int) -> None:
    """Gradient 3 at each of two voxels of class 1, and 1 at each of six of the background: half and half."""
    engine = Engine(lambda engine, batch: None)
    engine.register_events(*IterationEvents)
    watcher = WatchGradient({1: "lesion", 2: "absent"}, {"R27": {**LIMITS["R27"], "steps": 10}}, dict)
    watcher.attach(engine)
    logits = torch.zeros(1, *[heads][: heads > 0], 2, 2, 2, 2, requires_grad=True)
    label = torch.zeros(1, 1, 2, 2, 2)
    label[0, 0, 0, 0] = 1
    engine.state.iteration, engine.state.output = 1, {"pred": logits, "label": label}
    engine.fire_event(IterationEvents.FORWARD_COMPLETED)
    main_head = logits[:, 0] if heads else logits
    (main_head[:, :1] * (1 + 2 * label)).sum().backward()
    assert watcher._numbers() == [[0.5, 0.5, 0.0], [6.0, 2.0, 0.0]]
    assert watcher.judge(engine) == []  # half is not starved, and what never occurred is another rule's concern


def test_steps_that_the_gradient_scaler_leaves_out() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    state = SimpleNamespace(iteration=0, epoch_length=200)
    engine = SimpleNamespace(scaler=scaler, state=state, accumulation_steps=1)
    watcher = WatchFaults(NonFiniteSteps(Path("unused"), nn.Identity(), {}), LIMITS)
    for step in range(200):
        weight.grad = None
        scaler.scale(weight.sum() * (float("inf") if 50 <= step < 61 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        state.iteration += 1
        watcher._step(engine)
    assert (watcher.skips, watcher.steps) == (11, 200)
    assert [each.what for each in watcher.judge(engine)] == ["gradients overflow in half precision"]  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- a bundle


@pytest.mark.slow
def test_the_lesion_bundle_learns_without_a_finding(tiny_cohort: Manifest, tmp_path: Path) -> None:
    from pipelines.runner import BUNDLES

    arguments = ["--manifest", str(tiny_cohort.path), "--runs_dir", str(tmp_path), "--cache_dir", str(tmp_path / "c")]
    arguments += ["--run_name", "r", "--spacing", "[2.0,2.0,2.0]", "--patch_size", "[16,16,16]"]
    arguments += ["--filters", "[8,16,16]", "--steps_per_epoch", "15", "--max_epochs", "8"]
    arguments += ["--warmup_epochs", "1", "--learning_rate", "0.01"]
    bundle = BUNDLES / "brain_lesion_mri_segmentation"
    assert main(["train", str(bundle), *arguments]) == 0
    record = record_of(tmp_path / "brain_lesion_mri_segmentation" / "r")
    assert record["watchdogs"]["findings"] == []
    assert record["outcome"]["best_metric"] > 0.5
