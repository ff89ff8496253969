"""Real images: these tests run where ``FIDUCIAL_REAL_DATA`` names the folder that holds the public sets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the public sets; without it the tests are skipped, and say so."""
    folder = os.environ.get("FIDUCIAL_REAL_DATA")
    if not folder:
        pytest.skip("FIDUCIAL_REAL_DATA is not set: use `make test-real DATA=folder`")
    return Path(folder).resolve()
