"""What must be true of a run and of this machine before the run is exported (R42, R45 of the failure catalogue)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipelines.export.lock import Pin
from pipelines.export.source import TrainedRun
from pipelines.preflight.environment import check_packages
from pipelines.preflight.finding import Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule
from pipelines.training.run_folder import code_digest

Limits = Mapping[str, float]
COUNTS = ("n_", "epoch")  # of what went wrong: 0 is the best that they can be
MOST_NAMED = 6


def judge_results(found: Mapping[str, Any] | None, weights_sha256: str) -> list[Finding]:
    """R42: what ``summary.json`` says it is of (None = there is none), against the weights that are exported."""
    expected = "an evaluation of exactly these weights"
    if found is None:
        return [
            Finding(
                rule="R42",
                severity="error",
                what="metrics/summary.json is missing: nobody has measured these weights",
                measured="no evaluation",
                threshold=expected,
                cause="the run was not evaluated after its training",
                fix="fiducial evaluate BUNDLE --manifest COHORT --run_name RUN",
            )
        ]
    measured = found.get("weights_sha256")
    if measured == weights_sha256:
        return []
    return [
        Finding(
            rule="R42",
            severity="error",
            what="metrics/summary.json is of other weights",
            measured=f"weights {str(measured)[:12]}, exported are {weights_sha256[:12]}",
            threshold=expected,
            cause="the run was trained on after it was evaluated, or its folder holds results of an ensemble",
            fix="evaluate again into a folder of its own, and put it in the place of metrics/",
        )
    ]


def judge_artefacts(missing: Sequence[str]) -> list[Finding]:
    """R42: files that a run leaves behind and this one does not have."""
    if not missing:
        return []
    return [
        Finding(
            rule="R42",
            severity="error",
            what=f"the run lacks {', '.join(missing)}",
            measured=f"{len(missing)} missing",
            threshold="every file that a run writes",
            cause="the folder was cleaned up or copied in part",
            fix="restore the files; without them the run cannot be explained",
        )
    ]


def judge_history(history: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """R42: a logged figure that was 0 in every epoch measures nothing, or nothing was learnt."""
    keys = sorted({key for entry in history for key in entry if not key.startswith(COUNTS)})
    values = {key: [entry[key] for entry in history if entry.get(key) is not None] for key in keys}
    dead = [key for key, logged in values.items() if len(logged) > 1 and not any(logged)]
    if not dead:
        return []
    return [
        Finding(
            rule="R42",
            severity="warn",
            what=f"{', '.join(dead[:MOST_NAMED])} was 0 in every epoch",
            measured=f"{len(dead)} of {len(keys)} logged figures",
            threshold="figures that move",
            cause="a term without weight, a metric without data, or a network that predicts nothing",
            fix="look at the curves before you trust this network",
        )
    ]


def judge_code(trained: str | None, exporting: str) -> list[Finding]:
    """R45: digest of the sources that trained, and of those that go into the wheel."""
    if trained == exporting:
        return []
    return [
        Finding(
            rule="R45",
            severity="warn",
            what="the code that goes into the export is not the code that trained",
            measured=f"sources {exporting[:12]}, the run's {str(trained)[:12]}",
            threshold="the same sources",
            cause="the checkout has moved on since the training",
            fix="check out the run's commit, or evaluate the run again with this code",
            evidence={"trained": trained, "exporting": exporting},
        )
    ]


def judge_versions(differing: Mapping[str, tuple[str, str]]) -> list[Finding]:
    """R45: package -> (version here, version in the lock), of those that differ."""
    if not differing:
        return []
    named = [f"{name} {here} (lock {locked})" for name, (here, locked) in sorted(differing.items())]
    return [
        Finding(
            rule="R45",
            severity="warn",
            what="the golden case is made with other versions than the hospital will have",
            measured=", ".join(named[:MOST_NAMED])
            + (f" and {len(named) - MOST_NAMED} more" if named[MOST_NAMED:] else ""),
            threshold="the versions of locks/cpu.txt",
            cause="this environment was not made from constraints.txt, or the locks are older",
            fix="export from an environment of `make test`, or make the locks again",
            evidence={name: list(versions) for name, versions in sorted(differing.items())},
        )
    ]


def differing_versions(pins: Sequence[Pin]) -> dict[str, tuple[str, str]]:
    """Return (version here, version in the lock) of every locked package that is installed in another version."""
    differing: dict[str, tuple[str, str]] = {}
    for pin in pins:
        try:
            here = version(pin.name)
        except PackageNotFoundError:
            continue
        if here.partition("+")[0] != pin.version.partition("+")[0]:
            differing[pin.name] = (here, pin.version)
    return differing


def check_results(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R42 for the run's evaluation."""
    run: TrainedRun = inspection.need("run")
    return judge_results(None if run.summary is None else run.summary.get("source", {}), run.weights_sha256)


def check_artefacts(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R42 for the files of the run's folder."""
    folder = inspection.need("run").folder
    present = {"tensorboard/": any((folder / "tensorboard").glob("events.*"))}
    if (folder / "metrics" / "summary.json").is_file():
        present["metrics/per_case.csv"] = (folder / "metrics" / "per_case.csv").is_file()
    return judge_artefacts([name for name, there in present.items() if not there])


def check_history(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R42 for the run's logged figures."""
    return judge_history(inspection.need("run").record["outcome"].get("history", []))


def check_code(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R45 for the sources."""
    return judge_code(inspection.need("run").record.get("code_digest"), code_digest())


def check_versions(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R45 for the versions of the packages."""
    return judge_versions(differing_versions(inspection.need("pins")))


RULES: tuple[Rule, ...] = (
    Rule("R42", "an evaluation of these weights", check_results, when="export"),
    Rule("R42", "files of the run", check_artefacts, when="export"),
    Rule("R42", "logged figures", check_history, when="export"),
    Rule("R45", "packages", check_packages, when="export"),
    Rule("R45", "versions of the lock", check_versions, when="export"),
    Rule("R45", "sources", check_code, when="export"),
)
