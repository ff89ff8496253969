"""The figure that selects the weights of a fusion, its pictures, and a trained lesion head read back from its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.engines import SupervisedEvaluator
from monai.inferers import SimpleInferer
from numpy.testing import assert_allclose

from pipelines.metrics import image_quality
from pipelines.networks import segmentation_network
from pipelines.training import ValidationFusion, fusion_pictures, load_lesion_head
from pipelines.training.checkpoints import save_weights
from pipelines.training.fusion import LESION_HEAD
from transforms.errors import BundleError, DataError, find_error
from transforms.fusion import REFERENCE_CHANNELS

SHAPE = (18, 13, 7)


def reference(seed: int, brain: bool = True, bone: bool = True) -> np.ndarray:
    """(6, 18, 13, 7): textured MRI and CT, a box of brain between two plates of bone."""
    draw = np.random.default_rng(seed)
    mri, ct = draw.uniform(0, 1, (2, *SHAPE)).astype(np.float32)
    masks = np.zeros((2, *SHAPE), np.float32)
    masks[0, 4:13, 3:10, 2:5] = brain
    masks[1, 1:3, 2:11, 1:6] = masks[1, 14:17, 2:11, 1:6] = bone
    target = 2 * np.where(masks[1] > 0, ct, mri) - 1
    return np.stack([target, mri, ct, *masks, np.zeros(SHAPE)]).astype(np.float32)


def channel(of: np.ndarray, name: str) -> np.ndarray:
    return of[REFERENCE_CHANNELS.index(name)]


def perfect(of: np.ndarray) -> np.ndarray:
    return (channel(of, "x0") + 1) / 2


def noisy(of: np.ndarray, seed: int, size: float = 0.1) -> np.ndarray:
    return perfect(of) + np.random.default_rng(seed).normal(0, size, SHAPE).astype(np.float32)


def batch(*cases: tuple[np.ndarray, np.ndarray]) -> dict[str, torch.Tensor]:
    """Fused images and references as a batch; the network of the evaluator passes the images on."""
    fused = torch.stack([torch.as_tensor(image).reshape(-1, *SHAPE) for image, _ in cases])
    return {"image": fused.float(), "label": torch.stack([torch.as_tensor(truth) for _, truth in cases])}


def validated(*batches: dict[str, torch.Tensor]) -> dict[str, float]:
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=list(batches),
        network=torch.nn.Identity(),
        inferer=SimpleInferer(),
        key_val_metric={"fusion_score": ValidationFusion()},
    )
    evaluator.run()
    return evaluator.state.metrics


def direct(fused: np.ndarray, truth: np.ndarray, roi: str, source: str) -> dict[str, Any]:
    """The figures of one region by the metric itself, with the reference outside of the region."""
    inside, image = channel(truth, roi) > 0, channel(truth, source)
    shown = np.where(inside, fused, image)
    return image_quality(shown, image, 1.0, inside, metrics=("ssim", "psnr_db"), border="reflect")


def test_it_is_the_mean_over_cases_of_the_metric_itself() -> None:
    truths = [reference(seed) for seed in range(3)]
    images = [noisy(truth, seed, size) for seed, (truth, size) in enumerate(zip(truths, (0.05, 0.1, 0.3), strict=True))]
    cases = list(zip(images, truths, strict=True))
    found = validated(batch(*cases[:2]), batch(cases[2]))
    brain = np.mean([direct(*case, "brain", "mri_display")["ssim"] for case in cases])
    bone = [direct(*case, "bone", "ct_display") for case in cases]
    bone_ssim, psnr = (np.mean([row[name] for row in bone]) for name in ("ssim", "psnr_db"))
    assert 0.3 < brain < 0.99
    assert found["brain_ssim"] == pytest.approx(brain)
    assert found["bone_ssim"] == pytest.approx(bone_ssim)
    assert found["bone_psnr_db"] == pytest.approx(psnr)
    assert found["fusion_score"] == pytest.approx((brain + bone_ssim) / 2)


def test_a_perfect_fusion_scores_one() -> None:
    truth = reference(0)
    found = validated(batch((perfect(truth), truth)))
    assert found["fusion_score"] == pytest.approx(1, abs=1e-6)
    assert found["bone_psnr_db"] > 90  # 100 dB is the cap; (x0 + 1) / 2 costs the last bits of a float
    # planted: the regions exchanged
    inside_out = np.where(channel(truth, "bone") > 0, channel(truth, "mri_display"), channel(truth, "ct_display"))
    assert validated(batch((inside_out, truth)))["fusion_score"] < 0.7  # thin regions: much of a window is reference


# An error of 0.1 everywhere in the bone, with a range of 1: 10 log10(1 / 0.01) = 20 dB.
def test_psnr_by_hand_and_nothing_outside_of_a_region_counts() -> None:
    truth = reference(1)
    brain, bone = (channel(truth, roi) > 0 for roi in ("brain", "bone"))
    fused = perfect(truth) + 0.1 * bone
    found = validated(batch((fused, truth)))
    assert found["bone_psnr_db"] == pytest.approx(20, abs=1e-4)
    assert found["brain_ssim"] == pytest.approx(1, abs=1e-6)
    elsewhere = np.where(brain | bone, fused, 7.0)
    assert validated(batch((elsewhere, truth))) == found


def test_of_mean_and_deviation_the_mean_is_measured() -> None:
    truth = reference(2)
    fused = noisy(truth, 5)
    both = np.stack([fused, np.full(SHAPE, 0.3, np.float32)])
    assert validated(batch((both, truth))) == validated(batch((fused, truth)))


def test_a_case_without_a_region_counts_in_the_others() -> None:
    whole, boneless = reference(3), reference(4, bone=False)
    cases = [(noisy(truth, seed), truth) for seed, truth in enumerate((whole, boneless))]
    found = validated(batch(*cases))
    brain = [direct(*case, "brain", "mri_display")["ssim"] for case in cases]
    assert found["brain_ssim"] == pytest.approx(np.mean(brain))
    assert found["bone_ssim"] == pytest.approx(direct(*cases[0], "bone", "ct_display")["ssim"])


@pytest.mark.parametrize("missing", ["brain", "bone"])
def test_a_split_without_a_region_is_refused(missing: str) -> None:
    truth = reference(5, **{missing: False})
    with pytest.raises(Exception, match="no case contributes") as caught:
        validated(batch((perfect(truth), truth)))
    assert isinstance(find_error(caught.value), DataError)


def test_every_validation_starts_afresh() -> None:
    truth = reference(6)
    metric = ValidationFusion()
    for image in (noisy(truth, 1, 0.4), perfect(truth)):
        metric.reset()
        metric.update([{"pred": torch.as_tensor(image)[None], "label": torch.as_tensor(truth)}])
    assert metric.compute() == pytest.approx(1, abs=1e-6)


# ---- pictures ------------------------------------------------------------------------------------------------------


# 18 x 13 x 7 voxels: an axial panel has 13 rows (anterior on top) and 18 columns, three stand side by side.
def test_pictures_show_target_fused_and_their_difference() -> None:
    truth = reference(7)
    fused = perfect(truth)
    fused[9, 11, 3] += 0.25  # in all three middle planes only where they meet: x = 9, z = 3
    pictures = fusion_pictures({"pred": torch.as_tensor(fused)[None], "label": torch.as_tensor(truth)})
    shapes = {name: picture.shape for name, picture in pictures.items()}
    assert shapes == {"sagittal": (7, 3 * 13, 3), "coronal": (7, 3 * 18, 3), "axial": (13, 3 * 18, 3)}
    axial = pictures["axial"]
    assert_allclose(axial[:, :18, 0], np.clip(perfect(truth)[:, ::-1, 3].T, 0, 1), atol=1e-6)
    assert_allclose(axial[:, 18:36, 0], np.clip(fused[:, ::-1, 3].T, 0, 1), atol=1e-6)
    difference = axial[:, 36:, 0]
    assert difference[1, 9] == pytest.approx(1, abs=1e-5)  # y = 11 of 0 .. 12 is the second row from above
    assert np.count_nonzero(difference > 1e-5) == 1
    assert pictures["sagittal"][3, 2 * 13 + 11, 0] == pytest.approx(1, abs=1e-5)
    assert pictures["coronal"][:, 36:].max() == pytest.approx(0, abs=1e-5)  # y = 6 does not meet the voxel
    assert {picture.dtype for picture in pictures.values()} == {np.dtype(np.float32)}


# ---- lesion head ---------------------------------------------------------------------------------------------------

CONTRACT = {"network": LESION_HEAD, "spacing": [2.0, 2.0, 2.0], "patch_size": [32, 32, 1], "filters": [4, 8, 8]}


def written(folder: Path, **changes: Any) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(3)
    network = segmentation_network(2.5, 1, 2, (2.0, 2.0, 2.0), (32, 32, 1), (4, 8, 8), stack_slices=1)
    save_weights(network, {"contract": {**CONTRACT, **changes}}, folder / "head.safetensors")
    return folder / "head.safetensors", network


def test_a_lesion_head_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path, network = written(tmp_path)
    head = load_lesion_head(path)
    assert head is not None
    assert not head.training
    image = torch.rand(2, 1, 32, 32, 5)
    with torch.no_grad():
        logits = head(image)
        assert_allclose(logits, network.eval()(image))
    assert logits.shape == (2, 2, 32, 32, 5)


def test_without_a_path_there_is_no_lesion_head() -> None:
    assert load_lesion_head("") is None


def test_weights_of_another_kind_are_no_lesion_head(tmp_path: Path) -> None:
    path, _ = written(tmp_path, network="denoiser")
    with pytest.raises(BundleError, match="no lesion head") as caught:
        load_lesion_head(path)
    assert "'denoiser'" in str(caught.value)
    assert "train_lesion_head.yaml" in str(caught.value)
    with pytest.raises(BundleError, match="no such file"):
        load_lesion_head(tmp_path / "none.safetensors")
    other, _ = written(tmp_path, filters=[4, 8, 16])
    with pytest.raises(BundleError, match="another architecture"):
        load_lesion_head(other)
