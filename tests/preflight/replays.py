"""Ten failures that really happened, each played again the way it was made: as a configuration, or as a data set.

Every replay is what a user types, on a small generated cohort, and what has to come back: the rule's id and the exit
code, before anything expensive. Nine are found by ``fiducial check``, one needs two epochs of training.

    python tests/preflight/replays.py          # prints a table with the seconds of each
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))  # before tests/, which has folders called transforms and pipelines too
    sys.path += [str(folder) for folder in (HERE, HERE.parent / "pipelines")]

import torch  # noqa: E402
import yaml  # noqa: E402
from monai.losses import DeepSupervisionLoss, DiceCELoss  # noqa: E402
from proof_labels import cohort  # noqa: E402
from proof_network import folder, lesion, lesion_manifest, pair_manifest  # noqa: E402

from pipelines.cli import main  # noqa: E402
from pipelines.manifests import write_manifest  # noqa: E402
from pipelines.training import save_weights  # noqa: E402

LESION, FUSION = "brain_lesion_mri_segmentation", "head_mri_ct_fusion"
SMALL: Mapping[str, Mapping[str, Any]] = {
    LESION: {"spacing": [4.0, 4.0, 4.0], "patch_size": [32, 32, 32], "filters": [8, 16, 32], "precision": "fp32"},
    FUSION: {
        "spacing": [4.0, 4.0, 4.0],
        "patch_size": [48, 56, 1],
        "channels": [8, 16, 24],
        "precision": "fp32",
        "schedule": "cosine",
    },
}


@dataclass(frozen=True)
class Replay:
    """A failure as a user would make it.

    Attributes:
        name: of the failure.
        how: what of configuration or data is as it was then.
        rule: that names it; or, in quotes, the refusal that comes before any rule could look.
        code: exit code that it ends with.
        words: (folder to write into) -> words of the command, without the first (``check``).
        command: ``check``, or ``train`` where only a run can show it.
    """

    name: str
    how: str
    rule: str
    code: int
    words: Callable[[Path], list[str]]
    command: str = "check"


@dataclass(frozen=True)
class Played:
    """What came back: exit code, findings that are errors as (rule, what), seconds, and the text on stderr."""

    code: int
    errors: list[tuple[str, str]]
    seconds: float
    said: str


def play(replay: Replay, where: Path) -> Played:
    """Type the command of a replay, in a folder of its own."""
    with contextlib.redirect_stdout(io.StringIO()):
        words = [replay.command, *replay.words(where), "--cache_dir", str(folder() / "replays")]
    words += ["--runs_dir", str(where / "runs"), "--device_name", "cpu"]
    words += ["-o", str(where / "out")] if replay.command == "check" else ["--run_name", "replay"]
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    return Played(code, _errors(where), time.perf_counter() - start, said.getvalue())


def _errors(where: Path) -> list[tuple[str, str]]:
    checked, record = where / "out" / "preflight.json", where / "runs" / LESION / "replay" / "record.json"
    found: list[Mapping[str, Any]] = []
    if checked.is_file():
        found = json.loads(checked.read_text()).get("findings", [])
    elif record.is_file():
        found = json.loads(record.read_text()).get("watchdogs", {}).get("findings", [])
    return [(each["rule"], each["what"]) for each in found if each["severity"] == "error"]


# --- as configurations


def laid_over(where: Path, bundle: str, manifest: Path, content: Mapping[str, Any], **options: Any) -> list[str]:
    """Return the words of a command with a configuration file laid over the bundle's."""
    words = [bundle, "--manifest", str(manifest)]
    if content:
        where.mkdir(parents=True, exist_ok=True)
        (where / "variant.yaml").write_text(yaml.safe_dump(dict(content)))
        words += ["--variant", str(where / "variant.yaml")]
    for key, value in {**SMALL[bundle], **options}.items():
        words += [f"--{key}", str(value)]
    return words


def gamma_after_z_score(where: Path) -> list[str]:
    clipped = {
        "_target_": "RandLambdad",
        "keys": "image",
        "func": "$lambda image: image.clamp(min=0) ** 0.9",
        "prob": 1.0,
    }
    return laid_over(where, LESION, lesion_manifest(), {"+train#preprocessing#transforms": [clipped]})


def min_max_beside_z_score(where: Path) -> list[str]:
    scaled = (
        "$lambda x: torch.stack([(x[0] - x[0].mean()) / x[0].std(), (x[1] - x[1].min()) / (x[1].max() - x[1].min())])"
    )
    condition = {"_target_": "Lambdad", "keys": "image", "func": scaled}
    return laid_over(where, FUSION, pair_manifest(), {"condition": condition, "windows": []})


def truth_as_prediction(where: Path) -> list[str]:
    steps = [{"_target_": "DeleteItemsd", "keys": "pred"}]
    steps += [{"_target_": "CopyItemsd", "keys": "label", "names": "pred"}]
    answer = {"validate#postprocessing": {"_target_": "Compose", "transforms": steps}}
    return laid_over(where, LESION, lesion_manifest(), answer)


def one_step_coefficients(where: Path) -> list[str]:
    common = yaml.safe_load((HERE.parents[1] / "bundles" / FUSION / "configs" / "common.yaml").read_text())
    inferer = {**common["inferer"], "_target_": "proof_sampler.Strides"}
    return laid_over(where, FUSION, pair_manifest(), {"validate#inferer": inferer})


class UnboundHeads(DeepSupervisionLoss):
    """MONAI's loss over the heads that a DynUNet returns in one tensor."""

    def __init__(self, name: str, weights: list[float]) -> None:
        super().__init__(DiceCELoss(to_onehot_y=True, softmax=True), weights=weights)

    def forward(self, outputs: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return super().forward(list(outputs.unbind(1)), label)


def reversed_head_weights(where: Path) -> list[str]:
    heads = 1 + lesion().network.deep_supr_num
    weights = sorted(0.533 / 2**head for head in range(heads))
    loss = {"_target_": "replays.UnboundHeads", "_mode_": "callable", "weights": weights}
    return laid_over(where, LESION, lesion_manifest(), {"loss": loss})


def best_rewritten_in_every_epoch(where: Path) -> list[str]:
    careless = {"_target_": "proof_watch.CopyLastToBest", "path": str(where / "runs" / LESION / "replay")}
    short = {"max_epochs": 3, "steps_per_epoch": 2, "warmup_epochs": 1, "early_stopping_min_delta": 0.9}
    return laid_over(where, LESION, lesion_manifest(), {"+train#handlers": [careless]}, **short)


def untrained_parent(where: Path) -> list[str]:
    path = where / "phase1.safetensors"
    header = {"contract": dict(lesion().contract), "epoch": 0, "manifest_digest": cohort().digest}
    save_weights(lesion().network, header, path)
    return laid_over(where, LESION, lesion_manifest(), {}, initial_weights=path)


# --- as data sets


def imported(where: Path, *labels: str) -> Path:
    """Import the lesion cohort once more with another label table; its masks know 0 and 1 only."""
    words = [
        "manifest",
        "import",
        "folder",
        str(lesion_manifest().parent),
        "--name",
        "again",
        "-o",
        str(where / "m.json"),
    ]
    words += ["--image", "flair={subject}/flair.nii.gz", "--image", "t1={subject}/t1.nii.gz"]
    words += ["--label", "{subject}/lesion.nii.gz", *(word for label in labels for word in ("--label-name", label))]
    assert main([*words, "--fractions", "0.6", "0.4", "0"]) == 0
    return where / "m.json"


def ignored_value_absent(where: Path) -> list[str]:
    manifest = imported(where, "0:unlabelled", "1:epithelium")
    loss = "$lambda name: losses.DeepSupervisionLoss(losses.segmentation_loss(name, ignore_index=-100))"
    return laid_over(where, LESION, manifest, {"loss": loss})


def classes_without_labels(where: Path) -> list[str]:
    return laid_over(where, LESION, imported(where, "1:red cell", "2:white cell", "3:platelet"), {})


def unannotated_as_negatives(where: Path) -> list[str]:
    first = next(case for case in cohort().cases if case.split == "train")
    cases = tuple(replace(case, annotated=(0,)) if case is first else case for case in cohort().cases)
    where.mkdir(parents=True, exist_ok=True)
    write_manifest(replace(cohort(), cases=cases), where / "m.json", absolute_root=True)
    return laid_over(where, LESION, where / "m.json", {})


REPLAYS = [
    Replay(
        "gamma after z-score, with a clip at 0", "`train#preprocessing` ends with it, on every image",
        "R02", 4, gamma_after_z_score,
    ),
    Replay(
        "CT min-max beside MRI z-score", "`condition` scales each modality by a method of its own",
        "R01", 4, min_max_beside_z_score,
    ),
    Replay(
        "ground truth as prediction", "`validate#postprocessing` copies the label to the prediction",
        "R28", 4, truth_as_prediction,
    ),
    Replay(
        "strided sampler with the coefficients of one step", "`validate#inferer` is that sampler",
        "R23", 4, one_step_coefficients,
    ),
    Replay(
        "ignore_index -100 where unlabelled is 0", "`loss` has `ignore_index=-100`, over 90 % of the voxels unlabelled",
        "R06", 4, ignored_value_absent,
    ),
    Replay(
        "weights of the auxiliary heads reversed", "`loss` is MONAI's over the heads, the coarsest counts most",
        "R25", 4, reversed_head_weights,
    ),
    Replay(
        "best checkpoint saved outside the improvement test", "a handler in `train#handlers` writes it in every epoch",
        "R38", 4, best_rewritten_in_every_epoch, "train",
    ),
    Replay(
        "second phase from an untrained parent", "`initial_weights` names weights of epoch 0",
        "'untrained'", 4, untrained_parent,
    ),
    Replay(
        "classes without labels", "binary masks imported with a table of three classes",
        "R05", 3, classes_without_labels,
    ),
    Replay(
        "unannotated classes as negatives", "a case in whose mask nobody has looked for the class is 0 there",
        "R17", 3, unannotated_as_negatives,
    ),
]  # fmt: skip


@cache
def _silent() -> None:
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    _silent()
    sys.modules["replays"] = sys.modules["__main__"]
    print("| failure | replayed as | stopped by | seconds |\n|---|---|---|---|")
    for each in REPLAYS:
        with tempfile.TemporaryDirectory() as temporary:
            got = play(each, Path(temporary))
        named = [f"{rule}: {what}" for rule, what in got.errors if rule == each.rule]
        named += [line.removeprefix("error: ") for line in got.said.splitlines() if line.startswith("error: ")]
        verb = "" if each.command == "check" else " (`fiducial train`, second epoch)"
        print(f"| {each.name} | {each.how} | {named[0]}, exit code {got.code}{verb} | {got.seconds:.0f} |", flush=True)
