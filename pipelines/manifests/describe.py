"""A manifest in a few lines, for the terminal."""

from __future__ import annotations

from collections import Counter

from pipelines.manifests.model import SPLITS, Manifest


def describe(manifest: Manifest) -> str:
    """Return what a cohort holds: cases per split and fold, modalities, labels, spacings, and its digest."""
    cases = Counter(case.split for case in manifest.cases)
    subjects = {split: len({c.subject for c in manifest.cases if c.split == split}) for split in SPLITS}
    spacings = Counter(case.spacing for case in manifest.cases)
    lines = [
        f"cohort {manifest.name}: {len(manifest.cases)} cases, manifest {manifest.path}",
        "  splits      " + ", ".join(f"{s} {cases[s]} ({subjects[s]} subjects)" for s in SPLITS),
        "  modalities  "
        + ", ".join(f"{m.name} ({m.unit}{', optional' if m.optional else ''})" for m in manifest.modalities),
        "  labels      " + ", ".join(f"{label.id} {label.name}" for label in manifest.labels),
        "  spacing mm  " + ", ".join(f"{'x'.join(f'{s:g}' for s in k)} ({n})" for k, n in spacings.most_common(4)),
        f"  licence     {manifest.licence}",
        f"  digest      {manifest.digest}",
    ]
    if manifest.splits.folds:
        folds = Counter(case.fold for case in manifest.cases if case.fold is not None)
        lines.insert(2, "  folds       " + ", ".join(f"{fold}: {folds[fold]}" for fold in sorted(folds)))
    if manifest.left_out:
        lines.append(
            f"  left out    {len(manifest.left_out)} incomplete: {', '.join(x.case for x in manifest.left_out)}"
        )
    return "\n".join(lines)
