"""Locks and the bill of materials that follows from them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rfc3986_validator import validate_rfc3986

from pipelines.export.lock import LOCKS, Pin, licence_of, licences_of, read_lock
from pipelines.export.sbom import bill_of_materials, undeclared
from pipelines.runner import BUNDLES
from transforms.errors import BundleError

ROOT = BUNDLES.parent
A, B, C = "a" * 64, "b" * 64, "c" * 64
LOCK = f"""# comment
PyYAML==6.0.3 \\
    --hash=sha256:{B} \\
    --hash=sha256:{A}
torch==2.13.0+cpu \\
    --hash=sha256:{C}
"""


def test_a_lock_is_read_whatever_the_order_and_the_spelling_of_its_names() -> None:
    assert read_lock(LOCK, "x") == [Pin("pyyaml", "6.0.3", (A, B)), Pin("torch", "2.13.0+cpu", (C,))]


@pytest.mark.parametrize(
    "line",
    [
        "numpy>=2.0 --hash=sha256:" + A,
        "numpy==2.0",
        "--extra-index-url https://somewhere/simple",
        "numpy @ file:///wheels/numpy.whl --hash=sha256:" + A,
        "numpy==2.0 --hash=md5:" + A[:32],
        "pyyaml==5 --hash=sha256:" + A,
    ],
    ids=["range", "no hash", "index", "path", "weak hash", "twice"],
)
def test_a_line_that_leaves_something_open_is_no_lock(line: str) -> None:
    with pytest.raises(BundleError, match="make locks"):
        read_lock(LOCK + line + "\n", "x")


def test_an_empty_lock_is_none() -> None:
    with pytest.raises(BundleError, match="empty"):
        read_lock("# nothing\n", "x")


@pytest.mark.parametrize("name", LOCKS)
def test_the_locks_hold_what_the_package_requires_in_the_versions_of_the_tests(name: str) -> None:
    pins = {pin.name: pin.version for pin in read_lock((ROOT / "locks" / f"{name}.txt").read_text(), name)}
    tested = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    constraints = {canonicalize_name(package): version for package, version in tested.items()}
    required = re.search(r"^dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert required is not None
    for text in re.findall(r'"([^"]+)"', required[1]):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])
    for package, version in pins.items():
        if package in constraints:
            assert version.partition("+")[0] == constraints[package], package
    assert pins["torch"] == ("2.13.0+cpu" if name == "cpu" else "2.13.0")
    assert any(package.startswith("nvidia-") for package in pins) == (name == "cuda")
    assert "torchvision" not in pins


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_a_licence_on_file(name: str) -> None:
    licences = json.loads((ROOT / "locks" / "licences.json").read_text())
    pins = read_lock((ROOT / "locks" / f"{name}.txt").read_text(), name)
    assert [pin.name for pin in pins if pin.name not in licences] == []
    assert undeclared(pins, licences) == ([] if name == "cpu" else ["cuda-toolkit"])
    assert undeclared([Pin("new", "1", (A,))], licences) == ["new"]


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ({"license_expression": "MIT", "license": "x"}, "MIT"),
        ({"license": "BSD", "classifier": ["License :: OSI Approved :: BSD License", "Topic :: X"]}, "BSD License"),
        ({"license": "Apache-2.0"}, "Apache-2.0"),
        ({"license": "Copyright (c) 2001\nRedistribution and use in source"}, "not declared"),
        ({"license": "x" * 81}, "not declared"),
        ({}, "not declared"),
    ],
)
def test_the_licence_that_a_package_declares(metadata: dict[str, Any], licence: str) -> None:
    assert licence_of(metadata) == licence


def test_licences_of_a_report_are_sorted_by_canonical_name() -> None:
    report = {"install": [{"metadata": {"name": "PyYAML", "license": "MIT"}}, {"metadata": {"name": "b_c"}}]}
    assert list(licences_of(report).items()) == [("b-c", "not declared"), ("pyyaml", "MIT")]


def bill(version: str = "6.0.3") -> dict[str, Any]:
    pins = [Pin("pyyaml", version, (A, B)), Pin("torch", "2.13.0+cpu", (C,))]
    licences = {"pyyaml": "MIT", "torch": "BSD License"}
    return bill_of_materials(pins, licences, "lesions", "0.1.0", ("fiducial", "0.1.0"), A)


def test_the_bill_names_every_package_with_hashes_and_licence() -> None:
    own, yaml, torch = bill()["components"]
    assert (own["name"], own["hashes"]) == ("fiducial", [{"alg": "SHA-256", "content": A}])
    assert yaml["licenses"] == [{"expression": "MIT"}]
    assert torch["licenses"] == [{"license": {"name": "BSD License"}}]  # no SPDX expression, so it is given as a name
    assert torch["purl"] == "pkg:pypi/torch@2.13.0%2Bcpu"
    digests = [reference["hashes"][0]["content"] for reference in yaml["externalReferences"]]
    assert digests == [A, B]
    assert "hashes" not in yaml  # two files: neither is the component's one
    references = [component["bom-ref"] for component in bill()["components"]]
    assert bill()["dependencies"] == [{"ref": "bundle:lesions@0.1.0", "dependsOn": references}]
    assert len(set(references)) == 3


def addresses(value: Any) -> list[str]:
    """Return every ``url`` in nested values."""
    if isinstance(value, list):
        return [found for inner in value for found in addresses(inner)]
    if not isinstance(value, dict):
        return []
    own = [value["url"]] if "url" in value else []
    return own + [found for inner in value.values() for found in addresses(inner)]


def complaints(content: dict[str, Any]) -> list[str]:
    """Return what the official schema does not accept, and the addresses that are none.

    The schema asks for IRI, which the validator checks only beside a package that makes every start of MONAI seconds
    longer: they are held to URI here, which are fewer.
    """
    found = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(content))
    wrong = [address for address in addresses(content) if not validate_rfc3986(address, rule="URI_reference")]
    return [*([] if found is None else [str(found)]), *wrong]


def test_the_bill_passes_the_official_schema() -> None:
    assert complaints(bill()) == []
    assert len(addresses(bill())) > 2


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("hashes", "content", "short"), ("externalReferences", "url", "https://a b"), ("externalReferences", "type", "x")],
)
def test_the_schema_finds_a_planted_error(part: str, key: str, value: str) -> None:
    planted = bill()
    component = next(each for each in planted["components"] if part in each)
    component[part][0][key] = value
    assert complaints(planted) != []


@pytest.mark.slow
def test_the_bill_of_the_longest_lock_passes_the_official_schema() -> None:
    pins = read_lock((ROOT / "locks" / "cuda.txt").read_text(), "cuda")
    licences = json.loads((ROOT / "locks" / "licences.json").read_text())
    whole = bill_of_materials(pins, licences, "lesions", "0.1.0", ("fiducial", "0.1.0"), A)
    assert complaints(whole) == []


def test_the_bill_is_the_same_every_time_and_another_for_another_lock() -> None:
    assert bill() == bill()
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", bill()["serialNumber"])
    assert bill("6.0.4")["serialNumber"] != bill()["serialNumber"]
    assert "timestamp" not in json.dumps(bill())
