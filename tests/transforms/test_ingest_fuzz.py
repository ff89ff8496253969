"""Mutated NIfTI headers: none crashes the gate, and what is accepted has the voxels and the grid of its own bytes.

The mutations, and the decoder that judges what is accepted, are those of ``benchmarks/fuzz_ingest.py`` with its 10,000.
"""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from transforms.ingest import read_image

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz_ingest.py"


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_ingest", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_500_mutated_headers(fuzz: ModuleType, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGALRM, fuzz.alarm)
    try:
        outcomes = {seed: fuzz.outcome(seed, tmp_path)[0] for seed in range(20_000, 20_500)}
    finally:
        signal.signal(signal.SIGALRM, before)
    assert {seed: text for seed, text in outcomes.items() if text.startswith("FAILURE")} == {}
    # The run has met what it is for: both kinds of acceptance, and refusals of many kinds.
    kinds = set(outcomes.values())
    assert {"accepted: the same image", "accepted: another image, as its header says"} <= kinds
    assert len(kinds) > 12


def test_the_independent_decoder_agrees_on_the_sound_files(fuzz: ModuleType, tmp_path: Path) -> None:
    for number, content in enumerate(fuzz.SOUND):
        path = tmp_path / f"{number}.nii"
        path.write_bytes(content)
        image = read_image(path)
        voxels, affine = fuzz.decode(content)
        np.testing.assert_allclose(image.voxels, voxels, rtol=1e-6)
        np.testing.assert_allclose(image.affine, affine, atol=1e-5)


@pytest.mark.parametrize(("field", "offset"), [("descrip", 148), ("srow_x", 280)])
def test_the_judge_finds_a_planted_failure(fuzz: ModuleType, tmp_path: Path, field: str, offset: int) -> None:
    """A reader that returned other voxels, or the old affine for a new header, would be found out."""
    sound = fuzz.SOUND[0]
    (tmp_path / "a.nii").write_bytes(sound)
    image = read_image(tmp_path / "a.nii")
    content = bytearray(sound)
    content[offset + 2] ^= 64
    assert field in fuzz.changed_fields(sound, bytes(content))
    if field == "srow_x":
        assert fuzz.verdict(sound, bytes(content), image).startswith("FAILURE: accepted with other affine")
    else:
        assert fuzz.verdict(sound, bytes(content), image) == "accepted: the same image"
        image.voxels[0, 0, 0] += 1
        assert fuzz.verdict(sound, bytes(content), image).startswith("FAILURE: accepted with other voxels")
