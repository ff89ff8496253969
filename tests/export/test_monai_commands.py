"""MONAI's own commands on an unpacked export, offline: its metadata, its network, its exporters, its run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from pipelines.cli import main

pytestmark = pytest.mark.slow

FILES = ["--meta_file", "configs/metadata.json", "--config_file", "configs/inference.yaml"]


def monai(folder: Path, *arguments: str) -> str:
    """Run ``python -m monai.bundle`` in the folder, without a way to any network, and return what it printed."""
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    done = subprocess.run(
        [sys.executable, "-m", "monai.bundle", *arguments],
        cwd=folder,
        env={**os.environ, **nowhere},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_metadata_and_network_are_verified_offline(copy: Path) -> None:
    schema = ["--filepath", "docs/metadata.schema.json"]
    assert "verified with no error" in monai(copy, "verify_metadata", "--meta_file", "configs/metadata.json", *schema)
    assert "verified with no error" in monai(copy, "verify_net_in_out", "--net_id", "network_def", *FILES)


def test_the_exporters_make_the_same_network(copy: Path) -> None:
    """``ckpt_export`` and ``onnx_export`` read a file of torch.save; their networks answer like the exported one."""
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main(["state-dict", str(copy), "-o", str(copy / "model.pt")]) == 0
    given = ["--net_id", "network_def", "--ckpt_file", "model.pt", *FILES]
    monai(copy, "ckpt_export", "--filepath", "traced.ts", "--use_trace", "True", *given)
    monai(copy, "onnx_export", "--filepath", "made.onnx", *given)
    image = torch.randn(1, 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    ours = torch.export.load(copy / "models" / "model.pt2").module()(image)
    torch.testing.assert_close(torch.jit.load(copy / "traced.ts")(image), ours, atol=1e-4, rtol=1e-4)
    session = onnxruntime.InferenceSession(copy / "made.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), ours, atol=1e-3, rtol=1e-3)


def test_monai_runs_it_as_our_command_does(copy: Path, tmp_path: Path) -> None:
    scans, masks = copy / "golden" / "input", tmp_path / "masks"
    given = ["--input", str(scans), "--output_dir", str(masks), "--precision", "fp32", "--backend", "torch"]
    monai(copy, "run", "--config_file", "configs/inference.yaml", *given)
    expected = np.asarray(nib.load(copy / "golden" / "expected" / "phantom.nii").dataobj)
    np.testing.assert_array_equal(np.asarray(nib.load(masks / "phantom.nii.gz").dataobj), expected)
