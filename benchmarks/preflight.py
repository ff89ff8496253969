"""How long does the preflight take on a hundred heads at 1 mm?

Makes ``--distinct`` phantoms, prepares them once through the lesion bundle's own chain, and hands the rules a cohort of
``--cases`` cases that repeats them. Prints the seconds of every rule, of the battery, of the battery with kept findings
and of the fingerprint. Preparing the cases is not counted: a training needs it anyway, and finds it in the cache.

    .venv/bin/python benchmarks/preflight.py --cases 100
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.embedded import head_cohort
from pipelines.preflight import Inspection, Rule, run_battery
from pipelines.preflight.fingerprint import fingerprint_of
from pipelines.preflight.kept import FOLDER, kept_battery
from pipelines.preflight.rules import RULES
from pipelines.runner import bundle_parser

BUNDLE = "brain_lesion_mri_segmentation"


def enlarged(inspection: Inspection, cases: int) -> Inspection:
    """Return the run on a cohort of ``cases`` cases that repeats its own, each under a name of its own."""
    cohort = inspection.need("cohort")
    per_split = {split: [case for case in cohort.cases if case.split == split] for split in ("train", "validation")}
    counts = {"train": round(0.8 * cases), "validation": cases - round(0.8 * cases)}
    repeated = []
    datasets: dict[str, Any] = {}
    for split, own in per_split.items():
        dataset = copy(getattr(inspection, split))
        dataset.cases, data = [], []
        for number in range(counts[split]):
            case = own[number % len(own)]
            name = f"{case.id}_{number}"
            repeated.append(replace(case, id=name, subject=name))
            source = getattr(inspection, split).cases[number % len(own)]
            dataset.cases.append(replace(source, values={**source.values, "case": name}))
            if hasattr(dataset, "data"):
                data.append({**dataset.data[number % len(own)], "case": name})
        if data:
            dataset.data = data
        datasets[split] = dataset
    return replace(inspection, cohort=replace(cohort, cases=tuple(repeated)), **datasets)


def seconds(run: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Run the measurement and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--distinct", type=int, default=4)
    parser.add_argument("--spacing", type=float, default=1.0, help="mm")
    parser.add_argument("--folder", help="keeps phantoms and cache here for the next time")
    options = parser.parse_args()
    folder = Path(options.folder or tempfile.mkdtemp())
    spacing = [options.spacing] * 3
    cohort = head_cohort(folder / "heads", options.distinct, spacing, 0, ["flair", "t1", "t2"])
    cache = folder / "cache"
    overrides = {"manifest": str(cohort.path), "cache_dir": str(cache), "spacing": spacing}
    with bundle_parser(BUNDLE, "train", overrides) as parsed:
        inspection = enlarged(parsed.get_parsed_content("inspection"), options.cases)
        rules: list[Rule] = [rule for rule in RULES if rule.when == "preflight"]
        for rule in rules:
            took = seconds(lambda rule=rule: run_battery([rule], inspection))  # type: ignore[misc]
            print(f"{rule.id} {rule.name}: {took:.2f} s")
        shutil.rmtree(cache / FOLDER, ignore_errors=True)
        for name in ("battery", "battery, findings on the data kept"):
            took = seconds(lambda: kept_battery(rules, inspection, cache))
            print(f"{name}: {took:.1f} s for {len(rules)} checks of {options.cases} cases at {options.spacing:g} mm")
        print(f"fingerprint: {seconds(lambda: fingerprint_of(inspection)):.1f} s")
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
