"""The bundle contract, for every folder under ``bundles/``."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from monai.bundle import ConfigWorkflow
from monai.utils import BundleProperty, BundlePropertyConfig

from pipelines.preflight.configuration import lint, referenced_keys
from pipelines.runner import BUNDLES, bundle_parser, working_directory
from transforms.errors import BundleError

ROOTS = sorted(path.parent for path in BUNDLES.glob("*/configs"))
PARTS = {"train": "train", "evaluate": "infer", "inference": "infer"}
END_OF_HYPER_PARAMETERS = re.compile(r"^# -{20,}$")


def each_bundle(function: Any) -> Any:
    return pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.name)(function)


def each_configuration(function: Any) -> Any:
    pairs = [(root, part) for root in ROOTS for part in PARTS]
    return pytest.mark.parametrize(("root", "part"), pairs, ids=lambda value: getattr(value, "name", value))(function)


def targets(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yield (canonical JSON, place) of every ``_target_`` block."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield json.dumps(value, sort_keys=True), where
        for key, inner in value.items():
            yield from targets(inner, f"{where}::{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from targets(inner, f"{where}::{index}")


def repeated_targets(files: dict[str, Any]) -> dict[str, list[str]]:
    places = defaultdict(list)
    for name, content in files.items():
        for block, place in targets(content, name):
            places[block].append(place)
    return {block: where for block, where in places.items() if len(where) > 1}


def hyper_parameter_lines(text: str) -> list[str]:
    """Return the lines of the top-level keys that stand above the line of dashes, without the imports."""
    lines = []
    for line in text.splitlines():
        if END_OF_HYPER_PARAMETERS.match(line):
            return [line for line in lines if re.match(r"\w+:", line) and not line.startswith("imports:")]
        lines.append(line)
    raise AssertionError("no line of dashes ends the hyper-parameters")


@each_bundle
def test_files_are_there(root: Path) -> None:
    expected = ["common.yaml", "train.yaml", "evaluate.yaml", "inference.yaml", "metadata.json", "logging.conf"]
    assert [name for name in expected if not (root / "configs" / name).is_file()] == []
    assert (root / "docs" / "README.md").is_file()
    assert (root / "docs" / "data_license.txt").is_file()
    assert not list(root.rglob("*.py"))  # configuration and documentation only


@each_bundle
def test_no_target_block_stands_twice(root: Path) -> None:
    files = {path.name: yaml.safe_load(path.read_text()) for path in sorted((root / "configs").glob("*.yaml"))}
    assert repeated_targets(files) == {}


def test_a_repeated_block_is_found() -> None:
    block = {"_target_": "Dataset", "data": "@data"}
    files = {"a.yaml": {"x": block}, "b.yaml": {"y": {"_target_": "Compose", "transforms": [block]}}}
    assert list(repeated_targets(files).values()) == [["a.yaml::x", "b.yaml::y::transforms::0"]]


def wrong_ids(workflow: ConfigWorkflow) -> list[str]:
    """Return MONAI's properties that the configuration lacks or defines under another id, nothing instantiated."""
    required = [p[BundlePropertyConfig.ID] for p in workflow.properties.values() if p[BundleProperty.REQUIRED]]
    absent = [identity for identity in required if identity not in workflow.parser]
    optional = {name: p for name, p in workflow.properties.items() if not p[BundleProperty.REQUIRED]}
    return absent + [name for name, p in optional.items() if not workflow._check_optional_id(name, p)]


@each_configuration
def test_required_ids_and_references(root: Path, part: str) -> None:
    with working_directory(root):
        workflow = ConfigWorkflow(f"configs/{part}.yaml", workflow_type=PARTS[part])
        workflow.parser.parse()
        assert wrong_ids(workflow) == []
        lint({key: value for key, value in workflow.parser.get().items() if key != "_meta_"})


@each_configuration
def test_a_missing_id_is_found(root: Path, part: str) -> None:
    with working_directory(root):
        workflow = ConfigWorkflow(f"configs/{part}.yaml", workflow_type=PARTS[part])
        workflow.parser.parse()
        del workflow.parser.get()["device"]
        assert wrong_ids(workflow) == ["device"]
        with pytest.raises(BundleError, match="@device"):
            lint(workflow.parser.get())


@each_bundle
def test_variants_pass_the_lint(root: Path) -> None:
    for variant in sorted((root / "configs").glob("variant_*.yaml")):
        with bundle_parser(str(root), "train", {}, [f"configs/{variant.name}"]) as parser:
            changed = yaml.safe_load(variant.read_text())
            assert {key: parser.get()[key] for key in changed} == changed


@each_bundle
def test_several_processes_train_what_one_trains(root: Path) -> None:
    """The configuration laid over the training joins and leaves the processes, and changes nothing else."""
    with bundle_parser(str(root), "train", {}) as parser:
        alone = dict(parser.get())
    with bundle_parser(str(root), "train", {}, ["configs/multi_gpu_train.yaml"]) as parser:
        several = dict(parser.get())
    assert {key for key in {**alone, **several} if alone.get(key) != several.get(key)} == {"initialize", "finalize"}
    assert several["initialize"][1:] == alone["initialize"]
    assert "join_processes" in several["initialize"][0]
    assert ["leave_processes" in step for step in several["finalize"]] == [True]


@each_configuration
def test_hyper_parameters_are_commented_plain_values(root: Path, part: str) -> None:
    path = root / "configs" / f"{part}.yaml"
    lines = hyper_parameter_lines(path.read_text())
    content = yaml.safe_load(path.read_text())
    assert lines
    for line in lines:
        key = line.split(":")[0]
        assert "#" in line, f"{path.name}: {key} has no comment"
        value = content[key]
        assert not isinstance(value, dict), f"{key} is a block: it cannot be overridden as a value"
        assert not str(value).startswith(("$", "%", "@")), f"{key} is computed: it is no hyper-parameter"


@each_bundle
def test_logic_is_not_in_expressions(root: Path) -> None:
    for path in sorted((root / "configs").glob("*.yaml")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert "$" not in line or len(line) <= 140, f"{path.name}:{number} is too long for an expression"
            assert "lambda" not in line, f"{path.name}:{number} holds logic"


@each_bundle
def test_metadata_is_valid_offline(root: Path) -> None:
    schema = json.loads((BUNDLES / "metadata.schema.json").read_text())
    metadata = json.loads((root / "configs" / "metadata.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(metadata, schema)
    assert metadata["version"] in metadata["changelog"]
    for broken in ({"version": "one"}, {"network_data_format": {}}, {"authorz": "somebody"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**metadata, **broken}, schema)


@each_bundle
def test_overrides_reach_what_reads_them(root: Path) -> None:
    with bundle_parser(str(root), "train", {"max_epochs": 7, "learning_rate": 0.5}) as parser:
        assert parser.get_parsed_content("train::trainer::max_epochs", instantiate=False) == 7
        (phase,) = parser.get_parsed_content("plan")
        assert (phase.max_epochs, phase.rates) == (7, {".*": 0.5})
        assert {"plan", "optimizer"} <= set(referenced_keys({"train": parser.get()["train"]["trainer"]}))
