"""A misspelt option is an error that names the right one: tried on every hyper-parameter of the lesion bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser

from pipelines.preflight.configuration import lint, referenced_keys, refuse_absent_references
from pipelines.runner import BUNDLES, bundle_parser, working_directory
from transforms.errors import BundleError, UsageError

ROOT = BUNDLES / "brain_lesion_mri_segmentation"


def resolved(*files: str) -> dict[str, Any]:
    with working_directory(ROOT):
        parser = ConfigParser()
        parser.read_config([f"configs/{file}.yaml" for file in files])
        parser.parse()
        return {key: value for key, value in parser.get().items() if key != "_meta_"}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return resolved("train")


def options(config: dict[str, Any]) -> list[str]:
    """Return the hyper-parameters: what stands above the line of ``train.yaml`` and holds a plain value."""
    return [k for k, v in config.items() if not isinstance(v, dict) and not str(v).startswith(("$", "%", "@", "['$"))]


def typos(key: str) -> Iterator[str]:
    middle = len(key) // 2
    yield key[:middle] + key[middle + 1 :]
    yield key[:middle] + key[middle + 1] + key[middle] + key[middle + 2 :] if middle + 2 <= len(key) else key + "x"
    yield key[:-1] + key[-1] * 2
    yield key[1:]


def test_every_misspelt_option_is_refused_and_nearly_always_corrected(config: dict[str, Any]) -> None:
    tried, corrected = 0, 0
    for key in options(config):
        for typo in typos(key):
            if typo in config:
                continue
            with pytest.raises(UsageError) as caught:
                lint({**config, typo: 5})
            assert repr(typo) in caught.value.what
            tried += 1
            corrected += caught.value.fix == f"did you mean --{key}?"
    assert tried >= 100
    assert corrected / tried >= 0.9


@pytest.mark.parametrize("key", ["max_epoch", "val_intervall", "flip_axis", "mainfest"])
def test_common_ones(config: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError, match=key):
        lint({**config, key: 5})


@pytest.mark.parametrize("files", [("train",), ("evaluate",), ("inference",), ("train", "variant_2_5d")])
def test_the_bundle_itself_passes_with_all_its_keys(files: tuple[str, ...]) -> None:
    config = resolved(*files)
    assert len(config) > 20
    lint(config)


def test_every_option_of_the_bundle_can_be_overridden(config: dict[str, Any]) -> None:
    assert len(options(config)) > 30
    for key in options(config):
        lint({**config, key: 1})


@pytest.mark.parametrize("text", ["false", "False ", "TRUE", "null"])
def test_words_of_yaml_on_the_command_line_are_refused(config: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match="key 'bias_correction' has the text") as caught:
        lint({**config, "bias_correction": text})
    right = {"false": "False", "true": "True", "null": "None"}[text.strip().lower()]
    assert caught.value.fix == f"write --bias_correction {right}"


def test_real_booleans_and_none_pass(config: dict[str, Any]) -> None:
    lint({**config, "bias_correction": True, "filters": None})


def test_a_reference_to_nothing_is_refused_with_the_nearest(config: dict[str, Any]) -> None:
    wrong = {**config, "average": "$training.averaged_network(@netwrk, @ema_decay)"}
    with pytest.raises(BundleError, match="@netwrk") as caught:
        refuse_absent_references(wrong)
    assert caught.value.fix == "did you mean @network?"
    with pytest.raises(BundleError):
        lint(wrong)
    with pytest.raises(BundleError, match="@absent"):
        lint({**config, "device": "@absent"})


def test_an_at_sign_inside_a_text_is_no_reference(config: dict[str, Any]) -> None:
    lint({**config, "manifest": "/data/@archive/cohort.json"})
    lint({**config, "run_name": "me@hospital"})
    assert list(referenced_keys({"a": "x@b", "c": ["$f(@d) + @e::x", "@f#0"], "g": "@g"})) == ["d", "e", "f"]


def test_a_key_that_only_refers_to_itself_is_unread(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="'lonely'"):
        lint({**config, "lonely": {"a": "$@lonely['b']"}})


def test_the_parser_of_a_bundle_is_linted(tmp_path: Path) -> None:
    before = Path.cwd()
    with bundle_parser(ROOT.name, "train", {"max_epochs": 3}) as parser:
        assert parser.get("max_epochs") == 3
        assert Path.cwd() == ROOT
    with pytest.raises(UsageError, match="max_epoch"), bundle_parser(str(ROOT), "train", {"max_epoch": 3}):
        pass
    assert Path.cwd() == before
    with pytest.raises(BundleError, match="not found"), bundle_parser("brain_tumour", "train", {}):
        pass
    with pytest.raises(BundleError, match=r"no configs/none.yaml"), bundle_parser(str(ROOT), "none", {}):
        pass
