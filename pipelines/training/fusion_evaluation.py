"""Measure a fusion and the rules that it has to beat on the same degraded pairs, against the clean reference.

Every case is measured at every severity. A row of ``per_case.csv`` is one method on one case; its label is
``<method> @<severity>``, so that the tables and intervals of every other evaluation serve here as well. The reference
stays with the truth: no method sees it, but the composite by masks, which is there as an oracle and called so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.inferers import SlidingWindowInferer

from pipelines.files import write_json
from pipelines.metrics import segmentation_metrics, summarise
from pipelines.metrics.calibration import calibration_figures, count_calibration
from pipelines.metrics.fusion import HIGHER_IS_BETTER, error_uncertainty, fusion_figures
from pipelines.metrics.ranks import compare_methods, mean_ranks
from pipelines.reports.tables import format_table, read_per_case_csv, write_per_case_csv, write_summary_json
from pipelines.training.checkpoints import read_contract
from pipelines.training.fusion import load_lesion_head
from transforms.errors import DataError, UsageError
from transforms.fusion import CT, MRI, REFERENCE_CHANNELS, ct_display, mri_display
from transforms.fusion_rules import FUSION_RULES, hard_composite

logger = logging.getLogger(__name__)

ORACLE = "masks (oracle)"
MRI_ALONE = "mri alone"
LESION_FIGURES = ("dice", "hd95_mm", "nsd")
NAMED = frozenset({*FUSION_RULES, ORACLE, MRI_ALONE})
RANKED = ("brain_ssim_within", "bone_psnr_db", "bone_ssim_within", "lesion_dice")

Case = Mapping[str, Any]


def at_severities(
    items: Sequence[Mapping[str, Any]], severities: Sequence[float], shifts_mm: Sequence[float] = ()
) -> list[dict[str, Any]]:
    """Return every item once per severity, and once per shift of the CT alone; the case's name says which.

    ``scan`` keeps the case's own name, ``severity`` is what ``DegradePaird`` reads.
    """
    levels: dict[str, float | dict[str, float]] = {f"{level:g}": float(level) for level in severities}
    levels |= {f"shift {mm:g} mm": {"shift_mm": float(mm)} for mm in shifts_mm}
    return [
        {**item, "case": f"{item['case']}@{name}", "scan": item["case"], "severity": severity}
        for name, severity in levels.items()
        for item in items
    ]


def lesion_reader(path: str | Path, device: torch.device) -> LesionReader | None:
    """Return the reader of the weights at ``path``; None for an empty path."""
    network = load_lesion_head(path, device)
    return None if network is None else LesionReader(network, read_contract(path)["patch_size"], device)


class LesionReader:
    """A trained lesion head, applied to fused images: a real segmentation, which never sees the truth.

    Args:
        network: of ``load_lesion_head``: (B, 1, *spatial) in display units to logits (B, 2, *spatial).
        patch_size: windows of the network, voxels.
        device: where it runs.
    """

    def __init__(self, network: torch.nn.Module, patch_size: Sequence[int], device: torch.device) -> None:
        self.network = network
        self.inferer = SlidingWindowInferer(patch_size, sw_batch_size=16, overlap=0.25, mode="gaussian")
        self.device = device

    @torch.no_grad()
    def __call__(self, fused: np.ndarray) -> np.ndarray:
        """Return the probability of lesion (X, Y, Z) float32 of a fused image (X, Y, Z) in display units."""
        image = torch.as_tensor(fused, dtype=torch.float32, device=self.device)[None, None]
        logits = self.inferer(image, self.network)
        assert isinstance(logits, torch.Tensor)
        return logits.float().softmax(1)[0, 1:].sum(0).cpu().numpy()


class FusionCases:
    """Measure every fused case and its rivals; write ``per_case.csv``, ``summary.json`` and ``ranks.json``.

    Args:
        method: what the network is called in the tables.
        folder: the run's ``metrics``.
        source: of what these are results (``source_of``).
        subjects: subject of each case (with its severity), the unit of the bootstrap.
        spacing_mm: of the grid that the network works on.
        lesion: reads the probability of lesion from a fused image; None = no figures of lesions.
        compare_with: ``metrics`` folders of other evaluations of the same cases, whose networks join the ranks.
        reference_key, pair_key, scale_key, head_key: in the batch.

    Raises:
        UsageError: the network is called as one of the rules, or there is no evaluation to compare with.
        DataError: an evaluation that cannot be compared with, see ``rows_of_networks``.
    """

    def __init__(
        self,
        method: str,
        folder: str | Path,
        source: Mapping[str, Any],
        subjects: Mapping[str, str],
        spacing_mm: Sequence[float],
        lesion: Callable[[np.ndarray], np.ndarray] | None = None,
        compare_with: Sequence[str | Path] = (),
        reference_key: str = "label",
        pair_key: str = "pair",
        scale_key: str = "mri_scale",
        head_key: str = "foreground",
    ) -> None:
        if method in NAMED:
            raise UsageError(f"method {method!r}", "another row of the tables has this name", "give another --method")
        self.method = method
        self.folder = Path(folder)
        self.source = dict(source)
        self.subjects = dict(subjects)
        self.spacing_mm = tuple(float(s) for s in spacing_mm)
        self.lesion = lesion
        self.rivals = rows_of_networks(
            [Path(other) for other in compare_with], method, set(subjects), lesion is not None
        )
        self.keys = {"reference": reference_key, "pair": pair_key, "scale": scale_key, "head": head_key}
        self.rows: list[dict[str, Any]] = []
        self.uncertainty: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator whose output is samples in display units (samples, X, Y, Z)."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def __call__(self, engine: Engine) -> None:
        for item, batch in zip(engine.state.output, engine.state.batch, strict=True):
            case = batch["case"]
            values = {name: np.asarray(torch.as_tensor(batch[key]).cpu()) for name, key in self.keys.items()}
            samples = np.asarray(item["pred"].cpu())
            fused = samples.mean(0)
            truth = dict(zip(REFERENCE_CHANNELS, values["reference"], strict=True))
            severity = case.rpartition("@")[2]
            head, target = values["head"][0] > 0.5, (truth["x0"] + 1) / 2
            for name, image in self._fused(fused, values["pair"], values["scale"], truth["bone"]).items():
                figures = self._figures(image, truth, target, head, case)
                label = {"case": case, "subject": self.subjects[case], "label": f"{name} @{severity}"}
                self.rows.append({**label, "status": figures.pop("status", "both"), **figures})
            if len(samples) > 1:
                spread = error_uncertainty(fused, target, samples.std(0, ddof=1), head, case=case)
                lesion = {} if self.lesion is None else self._lesion_calibration(samples, truth["lesion"], head, case)
                self.uncertainty.append({"case": case, "subject": self.subjects[case], **spread, **lesion})

    def _lesion_calibration(
        self, samples: np.ndarray, lesion: np.ndarray, head: np.ndarray, case: str
    ) -> dict[str, float | int | None]:
        """Return ECE and Brier score of the lesion's probability: of the mean over samples, and of the first alone."""
        assert self.lesion is not None
        probabilities = np.stack([self.lesion(sample) for sample in samples])
        figures: dict[str, float | int | None] = {}
        for name, probability in (("", probabilities.mean(0)), ("_first", probabilities[0])):
            counts = count_calibration(probability, lesion > 0.5, head, case)
            measured = calibration_figures(counts)
            figures |= {f"lesion_{figure}{name}": measured[figure] for figure in ("ece", "brier")}
        return figures

    def _fused(self, ours: np.ndarray, pair: np.ndarray, scale: np.ndarray, bone: np.ndarray) -> dict[str, np.ndarray]:
        """Return the image of every method; all but the oracle see what the network sees."""
        mri, ct = mri_display(pair[MRI], scale), ct_display(pair[CT])
        rules = {name: rule(mri, ct, pair[CT]) for name, rule in FUSION_RULES.items()}
        return {self.method: ours, **rules, ORACLE: hard_composite(mri, ct, bone), MRI_ALONE: mri}

    def _figures(
        self, image: np.ndarray, truth: Case, target: np.ndarray, head: np.ndarray, case: str
    ) -> dict[str, Any]:
        figures: dict[str, Any] = fusion_figures(
            image,
            truth["mri_display"],
            truth["ct_display"],
            target=target,
            brain=truth["brain"] > 0.5,
            bone=truth["bone"] > 0.5,
            head=head,
            spacing_mm=self.spacing_mm,
            case=case,
        )
        if self.lesion is None:
            return figures
        found, there = (self.lesion(image) > 0.5).astype(np.uint8), (truth["lesion"] > 0.5).astype(np.uint8)
        (row,) = segmentation_metrics(found, there, self.spacing_mm, {1: "lesion"}, case=case)
        lesion = {f"lesion_{name}": row[name] for name in LESION_FIGURES}
        return {**figures, "status": row["status"], **lesion}  # missed and empty are those of the lesion

    def _write(self, engine: Engine) -> None:
        # the labels are methods and severities: a mean over them would mean nothing
        summary = {"source": self.source, **summarise(self.rows), "mean_over_labels": {}}
        write_per_case_csv(self.rows, self.folder / "per_case.csv")
        write_summary_json(summary, self.folder / "summary.json")
        ranks = self._ranks()
        write_json(self.folder / "ranks.json", ranks)
        if self.uncertainty:
            write_json(self.folder / "uncertainty.json", {"cases": self.uncertainty})
        logger.info("results of %d cases in %s\n%s", len(engine.data_loader), self.folder, format_table(summary))
        logger.info("mean rank over %s, 1 the best\n%s", ", ".join(ranks["figures"]), format_ranks(ranks))

    def _ranks(self) -> dict[str, Any]:
        """Return ranks and paired differences per severity; the oracle and the MRI alone are no rivals."""
        rows = [*self.rows, *self.rivals]
        ranks = {}
        for severity in sorted({row["case"].rpartition("@")[2] for row in rows}):
            values = rank_values([row for row in rows if row["case"].endswith(f"@{severity}")])
            better = {figure: HIGHER_IS_BETTER.get(figure, True) for figure in values}
            ranks[severity] = {
                "mean_ranks": mean_ranks(values, better),
                "differences": compare_methods(values, better, self.method),
            }
        figures = [figure for figure in RANKED if any(figure in row for row in rows)]
        return {"method": self.method, "figures": figures, "severities": ranks}


def rank_values(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return ``values[figure][method][subject]``, the mean over the cases of a subject; one severity's rows in.

    A figure that a case lacks for one method counts for none of them: where there is no lesion, a false alarm has the
    Dice 0, and finding nothing has no Dice.
    """
    rivals = [row for row in rows if method_of(row) not in (ORACLE, MRI_ALONE)]
    values: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    for figure in RANKED:
        measured = [row for row in rivals if figure in row]
        lacking = {row["case"] for row in measured if row[figure] is None}
        for row in measured:
            own = values.setdefault(figure, {}).setdefault(method_of(row), {}).setdefault(row["subject"], [])
            own.append(None if row["case"] in lacking else row[figure])
    return {
        figure: {
            method: {subject: _mean(cases) for subject, cases in of_subject.items()}
            for method, of_subject in of_method.items()
        }
        for figure, of_method in values.items()
    }


def method_of(row: Mapping[str, Any]) -> str:
    """Return the method of a row: its label without the severity."""
    return str(row["label"]).rpartition(" @")[0]


def rows_of_networks(folders: Sequence[Path], method: str, cases: set[str], lesions: bool) -> list[dict[str, Any]]:
    """Return the rows of the networks of other evaluations, which must have measured the same cases and figures.

    Args:
        folders: their ``metrics``.
        method: the name of the network that is measured here.
        cases: that are measured here.
        lesions: whether lesions are measured here.

    Raises:
        UsageError: there is no evaluation.
        DataError: it measured other cases, lesions or no lesions, or two networks have one name.
    """
    rows: list[dict[str, Any]] = []
    names = {method}
    for folder in folders:
        others = _rows_of_network(folder)
        there, theirs = {row["case"] for row in others}, {method_of(row) for row in others}
        if there != cases or names & theirs:
            raise DataError(
                f"compare_with {folder}",
                f"{len(there - cases)} and {len(cases - there)} cases are only in one of both; "
                f"same names: {sorted(names & theirs)}",
                "evaluate both on the same split and severities, each under a --method of its own",
            )
        if lesions != all("lesion_dice" in row for row in others):
            raise DataError(
                f"compare_with {folder}",
                f"figures of lesions are only in {'this evaluation' if lesions else 'the other one'}",
                "evaluate both with the same --lesion_head",
            )
        names |= theirs
        rows += others
    return rows


def _rows_of_network(folder: Path) -> list[dict[str, Any]]:
    path = folder / "per_case.csv"
    if not path.is_file():
        raise UsageError(f"compare_with {folder}", "there is no per_case.csv", "name the metrics folder of a run")
    return [row for row in read_per_case_csv(path) if method_of(row) not in NAMED]


def format_ranks(ranks: Mapping[str, Any]) -> str:
    """Return a line per severity: the methods from the best to the worst, each with its mean rank."""
    return "\n".join(
        f"@{severity}: " + ", ".join(f"{row['method']} {row['mean_rank']:.2f}" for row in found["mean_ranks"])
        for severity, found in ranks["severities"].items()
    )


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None
