"""A copy proves itself by the golden case: a healthy one passes, a changed weight or a changed chain does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from bundles_for_export import Exported, archive_of, new_key, with_sums

from pipelines import tensorfile
from pipelines.cli import main
from pipelines.export.archive import read_archive
from pipelines.export.golden import (
    Response,
    Tolerance,
    beyond,
    differences,
    golden_scans,
    read_golden,
)
from pipelines.export.selftest import run_backends, selftest
from pipelines.inference.backends import not_installed
from transforms.errors import BundleError, UsageError


def changed_weights(file: Path, factor: float) -> None:
    """Scale the last layer of the network."""
    tensors, header = tensorfile.read_tensors(file)
    name = next(name for name in sorted(tensors, reverse=True) if "output_block" in name and name.endswith("weight"))
    tensors[name] = tensors[name] * factor
    tensorfile.write_tensors(file, tensors, header)


def resigned(folder: Path, target: Path, key: Path) -> Path:
    """The archive of a folder, with sums and a signature of its own: a forger who has a key."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    plain = {name: content for name, content in files.items() if not name.startswith("SHA256SUMS")}
    target.write_bytes(archive_of(with_sums(plain, key)))
    return target


def test_archive_and_folder_pass_and_answer_exactly_here(exported: Exported) -> None:
    allowed = exported.keys / "allowed"
    for bundle in (exported.archive, exported.folder):
        (tested,) = selftest(bundle, ["torch"], allowed)
        assert (tested.backend, tested.status, tested.reason) == ("torch", "passed", "")
        assert tested.figures == {"response": 0.0, "phantom.nii": 0.0}


def test_a_changed_weight_fails_though_its_bundle_is_signed_again(
    exported: Exported, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    allowed = ["--allowed_signers", str(exported.keys / "allowed"), "--backend", "torch"]
    changed_weights(copy / "models" / "model.safetensors", 1.05)
    assert main(["selftest", str(copy), *allowed]) == 3  # the sums already say so
    forged = resigned(copy, tmp_path / "forged.zip", exported.keys / "key")
    capsys.readouterr()
    assert main(["selftest", str(forged), *allowed]) == 4
    assert "response differs by" in capsys.readouterr().err


def test_a_changed_chain_fails(copy: Path) -> None:
    common = copy / "configs" / "common.yaml"
    healthy = run_backends(copy, ["torch"])
    common.write_text(common.read_text().replace("background: 0.0", "background: 0.5"))
    (spoilt,) = run_backends(copy, ["torch"])
    assert [each.status for each in healthy] == ["passed"]
    assert spoilt.status == "failed"
    assert spoilt.figures["response"] > 1e-3


def test_an_unknown_backend_is_refused(exported: Exported) -> None:
    with pytest.raises(UsageError, match="torhc"):
        run_backends(exported.folder, ["torhc"])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda golden: (golden / "golden.json").write_text("{"),
        lambda golden: (golden / "response.safetensors").write_bytes(b"x"),
        lambda golden: (golden / "expected" / "phantom.nii").unlink(),
        lambda golden: shutil.rmtree(golden),
    ],
)
def test_a_golden_case_that_cannot_be_read_is_no_pass(copy: Path, spoil: object) -> None:
    assert callable(spoil)
    spoil(copy / "golden")
    with pytest.raises(BundleError):
        read_golden(copy)


def test_differences_by_hand() -> None:
    """Of 8 label voxels one differs: 1/8. The image differs by .25 at most, the response by .5."""
    labels, image = np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2, 2), np.float32)
    other = labels.copy()
    other[0, 0, 1] = 1
    brighter = image.copy()
    brighter[1, 1, 1], brighter[0, 0, 0] = -0.25, 0.125
    expected = Response(np.array([0.0, 1.0]), {"mask.nii": labels, "fused.nii": image})
    found = Response(np.array([0.5, 1.0]), {"mask.nii": other, "fused.nii": brighter})
    figures = differences(expected, found)
    assert figures == {"response": 0.5, "fused.nii": 0.25, "mask.nii": 0.125}
    assert beyond(figures, expected, Tolerance(response=0.5, voxels=0.125)) == []
    said = beyond(figures, expected, Tolerance(response=0.2, voxels=0.1))
    assert [text.split()[0] for text in said] == ["response", "fused.nii", "mask.nii"]
    assert differences(expected, expected) == {"response": 0.0, "fused.nii": 0.0, "mask.nii": 0.0}


def test_what_is_missing_of_another_shape_or_no_number_differs() -> None:
    expected = Response(np.zeros(2), {"mask.nii": np.zeros(3, np.uint8)})
    for found in (
        Response(np.zeros(2), {}),
        Response(np.zeros(2), {"mask.nii": np.zeros(4, np.uint8)}),
        Response(np.zeros(2), {"mask.nii": np.zeros(3, np.uint8), "more.nii": np.zeros(3, np.uint8)}),
        Response(np.zeros(3), {"mask.nii": np.zeros(3, np.uint8)}),
        Response(np.array([0, np.nan]), {"mask.nii": np.zeros(3, np.uint8)}),
    ):
        assert len(beyond(differences(expected, found), expected, Tolerance(1.0, 1.0))) == 1


@pytest.mark.parametrize(
    ("spacing", "patch"),
    [([1.0, 1.0, 1.0], [64, 64, 64]), ([0.5, 0.5, 5.0], [256, 256, 16]), ([2, 2, 2], [96, 112, 1])],
)
def test_the_golden_head_is_small_whatever_the_contract_and_the_same_every_time(
    spacing: list[float], patch: list[int]
) -> None:
    contract = {"modalities": ["flair", "T1ce", "ct"], "spacing": spacing, "patch_size": patch, "foreground": "mask"}
    scans = golden_scans(contract)
    assert scans == golden_scans(contract)
    assert sorted(scans) == ["T1ce.nii", "brain.nii", "ct.nii", "flair.nii"]
    images = {name: nib.Nifti1Image.from_bytes(content) for name, content in scans.items()}
    assert len({image.shape for image in images.values()}) == 1
    assert max(images["ct.nii"].shape) <= 140
    assert np.allclose(images["ct.nii"].header.get_zooms(), spacing)
    head = np.asarray(images["brain.nii"].dataobj)
    assert 0.05 < head.mean() < 0.9
    assert np.asarray(images["ct.nii"].dataobj).min() <= -1000  # air around it


def test_a_response_is_read_back_as_it_was_written(exported: Exported) -> None:
    expected, tolerances = read_golden(exported.folder)
    assert expected.response.dtype == np.float32
    assert np.allclose(expected.response.sum(1), 1, atol=1e-5)  # probabilities of both labels
    assert set(tolerances) >= {"torch", "pt2", "onnxruntime"}
    assert torch.from_numpy(expected.response).isfinite().all()


def test_the_archive_is_what_the_folder_is(exported: Exported) -> None:
    on_disk = {
        p.relative_to(exported.folder).as_posix(): p.read_bytes() for p in exported.folder.rglob("*") if p.is_file()
    }
    assert read_archive(exported.archive) == on_disk


def test_a_key_of_somebody_else_is_refused(exported: Exported, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    forged = resigned(exported.folder, tmp_path / "forged.zip", new_key(stranger))
    assert main(["selftest", str(forged), "--allowed_signers", str(exported.keys / "allowed")]) == 3


@pytest.mark.parametrize("backend", ["pt2", "torchscript", "onnxruntime", "openvino"])
def test_every_backend_that_is_installed_passes(exported: Exported, backend: str) -> None:
    if reason := not_installed(backend):
        pytest.skip(reason)
    (tested,) = run_backends(exported.folder, [backend])
    assert (tested.status, tested.reason) == ("passed", "")
    if backend == "pt2":
        assert tested.figures["response"] < 1e-6


def test_a_graph_of_other_weights_fails_on_its_own_backends_alone(copy: Path) -> None:
    """The lesion's logit is raised by .1 in the ONNX file: a probability of .5 becomes .525."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = copy / "models" / "model.onnx"
    model = onnx.load(path)
    bias = next(each for each in model.graph.initializer if each.name == "output_block.conv.conv.bias")
    raised = onnx.numpy_helper.to_array(bias) + np.array([0, 0.1], np.float32)
    bias.CopyFrom(onnx.numpy_helper.from_array(raised, bias.name))
    onnx.save(model, path)
    (copy / "models" / "parity.json").unlink()  # it would refuse the file by its digest
    tested = {each.backend: each.status for each in run_backends(copy, ["torch", "onnxruntime"])}
    assert tested == {"torch": "passed", "onnxruntime": "failed"}
