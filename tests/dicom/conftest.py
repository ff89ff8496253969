"""The end-to-end test trains as the tests of the bundles do: their helper is found from here."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "bundles"))
