"""The bill of materials of an installation: CycloneDX 1.6, every package with version, hashes and licence.

It follows from the lock alone, and says the same wherever it is made: the serial number is a digest of the content,
and there is no time in it.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from pipelines.export.lock import UNKNOWN, Pin
from pipelines.manifests.digest import canonical_digest

SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
NAMESPACE = uuid.UUID("5f6a1c1e-3c0d-5c0b-9b0e-6f1d3c0a7e11")  # any fixed one: it makes digests into serial numbers


def bill_of_materials(
    pins: Sequence[Pin], licences: Mapping[str, str], name: str, version: str, wheel: tuple[str, str], wheel_sha256: str
) -> dict[str, Any]:
    """Return the bill of materials of a bundle as JSON values.

    Args:
        pins: of the lock.
        licences: by canonical name; a package that is not there is ``not declared``.
        name, version: of the bundle.
        wheel: name and version of our own package, which stands in the bundle itself.
        wheel_sha256: of its file.
    """
    root = f"bundle:{name}@{version}"
    own = Pin(wheel[0], wheel[1], (wheel_sha256,))
    components = [_component(own, "Apache-2.0"), *(_component(pin, licences.get(pin.name, UNKNOWN)) for pin in pins)]
    references = [component["bom-ref"] for component in components]
    content = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {"type": "machine-learning-model", "bom-ref": root, "name": name, "version": version}
        },
        "components": components,
        "dependencies": [{"ref": root, "dependsOn": references}],
    }
    return {
        "$schema": SCHEMA,
        **content,
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, canonical_digest(content))}",
    }


def undeclared(pins: Sequence[Pin], licences: Mapping[str, str]) -> list[str]:
    """Return the packages whose licence nobody declares: somebody has to look."""
    return [pin.name for pin in pins if licences.get(pin.name, UNKNOWN) == UNKNOWN]


def _component(pin: Pin, licence: str) -> dict[str, Any]:
    address = f"pkg:pypi/{pin.name}@{pin.version}".replace("+", "%2B")
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": address,
        "name": pin.name,
        "version": pin.version,
        "purl": address,
        # CycloneDX has one hash per algorithm and file: every file that the lock allows is a reference of its own
        "externalReferences": [
            {"type": "distribution", "url": address, "hashes": [{"alg": "SHA-256", "content": digest}]}
            for digest in pin.sha256
        ],
    }
    if len(pin.sha256) == 1:
        component["hashes"] = [{"alg": "SHA-256", "content": pin.sha256[0]}]
    return {**component, "licenses": [_licence(licence)]}


def _licence(text: str) -> dict[str, Any]:
    try:
        return {"expression": canonicalize_license_expression(text)}
    except InvalidLicenseExpression:
        return {"license": {"name": text}}
