"""Exported graphs: they compute what the network computes, at any size, and equal weights are equal bytes."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from pipelines.export.formats import FILES, write_formats
from pipelines.networks import conditional_denoiser, input_divisor, segmentation_network
from transforms.errors import BundleError, UsageError

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the extra `onnx` is not installed",
)


def network_of(kind: str) -> tuple[nn.Module, int, list[int]]:
    """Return a small network with weights that are not those of its making, its channels and its patch."""
    torch.manual_seed(0)
    if kind == "3d":  # the third axis is pooled once less than the others
        network, channels, patch = (
            segmentation_network(3, 2, 2, [1.0, 1.0, 2.0], [16, 16, 8], [4, 8, 16]),
            2,
            [16, 16, 8],
        )
    elif kind == "2.5d":
        channels, patch = 2, [16, 16, 4]
        network = segmentation_network(2.5, 2, 3, [1.0] * 3, patch, [4, 8, 16])
    else:
        dimensions, patch = {"denoiser 2d": (2, [16, 16, 1]), "denoiser 3d": (3, [16, 16, 16])}[kind]
        channels = 5
        network = conditional_denoiser(dimensions, 3, [2.0] * 3, patch, [8, 8, 16])
    for parameter in network.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))  # a denoiser's last layer starts at zero
    return network, channels, patch


KINDS = ["3d", "2.5d", "denoiser 2d", "denoiser 3d"]


def images(kind: str, channels: int, patch: list[int]) -> list[torch.Tensor]:
    """Return a patch, and three images of another size; the last channel of a denoiser is a time."""
    made = [torch.rand(1, channels, *patch), torch.rand(3, channels, *[size + 16 for size in patch])]
    for image in made:
        if kind.startswith("denoiser"):
            image[:, -1] = 0.3
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_pt2_and_torchscript_are_the_network_bit_for_bit(kind: str, tmp_path: Path) -> None:
    network, channels, patch = network_of(kind)
    network.train()
    files = write_formats(network, channels, patch, tmp_path, ["torchscript", "pt2"])
    assert {name: path.name for name, path in files.items()} == {"pt2": "model.pt2", "torchscript": "model.ts"}
    assert network.training
    network.eval()
    program, script = torch.export.load(files["pt2"]).module(), torch.jit.load(files["torchscript"])
    for image in images(kind, channels, patch):
        with torch.no_grad():
            expected = network(image)
            assert torch.equal(program(image), expected)
            assert torch.equal(script(image), expected)


@needs_onnx
@pytest.mark.parametrize("kind", ["3d", pytest.param("2.5d", marks=pytest.mark.slow),
                                  pytest.param("denoiser 2d", marks=pytest.mark.slow),
                                  pytest.param("denoiser 3d", marks=pytest.mark.slow)])  # fmt: skip
def test_onnx_computes_what_the_network_does_and_says_its_axes(kind: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    network, channels, patch = network_of(kind)
    path = write_formats(network, channels, patch, tmp_path, ["onnx"])["onnx"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    network.eval()
    for image in images(kind, channels, patch):
        (output,) = session.run(["output"], {"image": image.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(output), network(image), rtol=0, atol=1e-4)
    axes = [axis.dim_param or axis.dim_value for axis in onnx.load(path).graph.input[0].type.tensor_type.shape.dim]
    expected = {
        "3d": ["batch", 2, "4*x", "4*y", "2*z"],
        "2.5d": ["batch", 2, "4*x", "4*y", "z"],
        "denoiser 2d": ["batch", 5, "4*x", "4*y", "z"],
        "denoiser 3d": ["batch", 5, "4*x", "4*y", "4*z"],
    }
    assert axes == expected[kind]


WRITE = """
import sys; sys.path.insert(0, {tests!r})
import torch
from test_formats import network_of
from pipelines.export.formats import write_formats
torch.jit.trace(torch.nn.Sequential(torch.nn.Conv3d(1, 1, 1), torch.nn.Conv3d(1, 2, 1)), torch.zeros(1, 1, 2, 2, 2))
torch.use_deterministic_algorithms({deterministic})
torch.backends.cudnn.benchmark = {deterministic}
network, channels, patch = network_of("2.5d")
write_formats(network, channels, patch, {folder!r}, {formats!r})
"""


@pytest.mark.slow
def test_equal_weights_are_equal_bytes_in_another_process(tmp_path: Path) -> None:
    """Another order of dictionaries, another working directory, other classes traced and algorithms chosen before."""
    onnx = [] if needs_onnx.args[0] else ["onnx"]
    formats = ["pt2", "torchscript", *onnx]
    network, channels, patch = network_of("2.5d")
    here = write_formats(network, channels, patch, tmp_path / "here", formats)
    other = not torch.are_deterministic_algorithms_enabled()  # a training in this process leaves them on
    code = WRITE.format(
        tests=str(Path(__file__).parent), folder=str(tmp_path / "there"), formats=formats, deterministic=other
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={"PYTHONHASHSEED": "7"})
    for name, path in here.items():
        assert path.read_bytes() == (tmp_path / "there" / FILES[name]).read_bytes(), name


def test_nothing_of_this_machine_is_in_a_file_and_other_weights_are_other_bytes(tmp_path: Path) -> None:
    network, channels, patch = network_of("3d")
    formats = ["pt2", "torchscript"] if needs_onnx.args[0] else []
    files = write_formats(network, channels, patch, tmp_path / "a", formats)
    places = [str(Path(__file__).parents[2]), str(Path(torch.__file__).parents[1]), "site-packages", str(tmp_path)]
    for path in files.values():
        content = path.read_bytes()
        assert [place for place in places if place.encode() in content] == []
    next(network.parameters()).data.flatten()[0] += 1
    others = write_formats(network, channels, patch, tmp_path / "b", ["pt2", "torchscript"])
    assert all(path.read_bytes() != files[name].read_bytes() for name, path in others.items())


@pytest.mark.parametrize(
    ("kind", "divisor"),
    [("3d", (4, 4, 2)), ("2.5d", (4, 4, 1)), ("denoiser 2d", (4, 4, 1)), ("denoiser 3d", (4, 4, 4))],
)
def test_the_divisor_is_read_from_the_network(kind: str, divisor: tuple[int, ...]) -> None:
    network, _, _ = network_of(kind)
    assert input_divisor(network, 3) == divisor
    assert input_divisor(nn.Conv3d(1, 2, 3), 3) is None


def test_without_a_divisor_the_size_is_that_of_the_patch(tmp_path: Path) -> None:
    files = write_formats(nn.Conv3d(1, 2, 3, padding=1), 1, [6, 5, 4], tmp_path, ["pt2"])
    program = torch.export.load(files["pt2"]).module()
    assert program(torch.zeros(3, 1, 6, 5, 4)).shape == (3, 2, 6, 5, 4)
    with pytest.raises((RuntimeError, AssertionError)):
        program(torch.zeros(1, 1, 7, 5, 4))


class Undecided(nn.Module):
    """What it does depends on a value: no graph can say that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if bool((x > 0).any()) else x


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    network, channels, patch = network_of("3d")
    with pytest.raises(UsageError, match="onxx"):
        write_formats(network, channels, patch, tmp_path, ["onxx"])
    with pytest.raises(BundleError, match="axis 1 has 18 voxels, the network pools it by 4"):
        write_formats(network, channels, [16, 18, 8], tmp_path, ["pt2"])
    with pytest.raises(BundleError, match="format pt2: the network cannot be exported"):
        write_formats(Undecided(), 1, [4, 4, 4], tmp_path, ["pt2"])
    assert list(tmp_path.iterdir()) == []
