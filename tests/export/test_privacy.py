"""Names and paths do not leave: what is taken out, and that what was forgotten is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.export.privacy import (
    Pseudonyms,
    described_cohort,
    pseudonyms_of,
    refuse_private,
    scrubbed,
    scrubbed_command,
)
from pipelines.export.results import pseudonymous_rows
from pipelines.manifests import Manifest
from transforms.errors import BundleError

NAMES = Pseudonyms({"Meier_t1": "case-1", "Meier": "case-2", "JD": "case-3", "a": "case-4"}, {"Meier": "subject-1"})


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("case Meier: 3 voxels", "case case-2: 3 voxels"),
        ("Meier_t1 and Meier", "case-1 and case-2"),  # the longer name first
        ("mask of Meier_seg", "mask of case-2_seg"),
        ("file /data/x/p1.nii.gz: unreadable", "file <path> unreadable"),
        ("../../runs", "<path>"),
        ("~/data", "<path>"),
        (r"D:\scans\x", "<path>"),
        ("['/a/b.nii','c']", "['<path>','c']"),
        ("sqlite:///mlflow.db", "<address>"),
        ("https://user:word@host:5000/x", "<address>"),
        # what must stay as it is
        ("JDK", "JDK"),
        ("60 x 66 mm, mm/s and/or w/o", "60 x 66 mm, mm/s and/or w/o"),
        ("@contract['spacing']", "@contract['spacing']"),
        ("%configs/common.yaml::inferer", "%configs/common.yaml::inferer"),
        ("a lesion of a head", "a lesion of a head"),  # a name of one letter is a word of any text
    ],
)
def test_a_text_without_names_paths_and_addresses(text: str, left: str) -> None:
    assert scrubbed(text, NAMES) == left


def test_values_are_scrubbed_wherever_they_stand() -> None:
    record = {"bad_cases": {"Meier": 3}, "manifest": "rel/cohort.json", "list": [{"what": "JD"}], "n": 1, "x": None}
    expected = {"bad_cases": {"case-2": 3}, "manifest": "<path>", "list": [{"what": "case-3"}], "n": 1, "x": None}
    assert scrubbed(record, NAMES) == expected


def test_a_command_keeps_its_options_and_loses_its_paths() -> None:
    words = ["/home/j/.venv/bin/fiducial", "train", "brain", "--manifest", "cohorts/Meier.json", "--max_epochs", "3"]
    words += ["--checkpoint=runs/x.safetensors", "--spacing", "[1.0,1.0,2.0]", "--modalities", "['flair']"]
    assert scrubbed_command(words, NAMES) == [
        *("fiducial", "train", "brain", "--manifest", "<path>", "--max_epochs", "3"),
        *("--checkpoint=<path>", "--spacing", "[1.0,1.0,2.0]", "--modalities", "['flair']"),
    ]


def test_pseudonyms_belong_to_a_cohort_and_tell_cases_from_subjects(tiny_cohort: Manifest) -> None:
    names = pseudonyms_of(tiny_cohort)
    assert set(names.cases) == set(names.subjects) == {"s0", "s1", "s2", "s3", "s4"}
    assert len({*names.cases.values(), *names.subjects.values()}) == 10
    assert pseudonyms_of(tiny_cohort) == names


def test_results_of_another_cohort_lose_their_names_too(tiny_cohort: Manifest) -> None:
    rows = [
        {"case": "s4@2", "subject": "s4", "label": "one pass @2", "dice": 0.5},
        {"case": "Okafor", "subject": "Okafor", "label": "lesion", "dice": 0.1},
    ]
    names = pseudonyms_of(tiny_cohort, rows)
    first, second = pseudonymous_rows(rows, names)
    assert first == {**rows[0], "case": f"{names.cases['s4']}@2", "subject": names.subjects["s4"]}
    assert "Okafor" not in str(second)


def test_a_cohort_is_described_without_its_names(tiny_cohort: Manifest) -> None:
    described = described_cohort(tiny_cohort, pseudonyms_of(tiny_cohort))
    train = described["splits"]["train"]
    assert (train["cases"], train["subjects"], len(train["case_digests"])) == (3, 3, 3)
    assert described["modalities"] == [{"name": "flair", "unit": "a.u."}, {"name": "t1", "unit": "a.u."}]
    assert described["manifest_digest"] == tiny_cohort.digest
    assert not any(name in str(described["splits"]) for name in ("s0", "s3'"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("docs/README.md", b"the worst case is Meier_t1"),
        ("results/Meier.json", b"{}"),
        ("models/model.ts", b"\x00\x01/srv/cohort/x.py\x00"),
        ("provenance/run.json", b'{"command": "/srv/cohort/run"}'),
    ],
)
def test_what_was_forgotten_is_found_and_not_repeated(file: str, content: bytes, tmp_path: Path) -> None:
    healthy = {"configs/a.yaml": b"$bundles.begin(@seed)", "LICENSE": b"a license for JD"}
    refuse_private(healthy, NAMES, ["/srv/cohort/"])
    on_disk = tmp_path / "part"
    on_disk.write_bytes(content)
    for stored in (content, on_disk):
        with pytest.raises(BundleError, match="export") as refused:
            refuse_private({**healthy, file: stored}, NAMES, ["/srv/cohort/"])
        assert "Meier_t1" not in str(refused.value)
        assert "/srv" not in str(refused.value)
