"""The end-to-end tests train as the tests of the bundles do: their helper is found from here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "bundles"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run ``r`` of the lesion bundle in ``runs`` and its tiny cohort in ``data``."""
    from bundle_runs import import_data, train, write_tiny_data

    folder = tmp_path_factory.mktemp("trained")
    write_tiny_data(folder / "data")
    assert import_data(folder / "data") == 0
    assert train(folder / "data") == 0
    return folder
