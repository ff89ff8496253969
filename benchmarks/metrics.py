"""All ratios and errors of the metrics in one run: each part is one of the scripts beside this one, with its defaults.

Names the packages that are compared, and those that are not installed. Run it on an idle machine.

    .venv/bin/python benchmarks/metrics.py [segmentation] [truth] [image] [instances] [crowded]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
from pathlib import Path

PARTS = {
    "segmentation": ("metrics_segmentation.py", "speed"),
    "truth": ("metrics_segmentation.py", "truth"),
    "image": ("metrics_image.py",),
    "instances": ("metrics_instances.py",),
    "crowded": ("metrics_instances.py", "--crowded"),
}
PEERS = {
    "monai": "speed of all parts",
    "scikit-image": "SSIM",
    "pymeshmetrics": "error against analytic surfaces",
    "vtk": "needed by pymeshmetrics",
    "surface-distance": "error against analytic surfaces",
}


def version_of(package: str) -> str:
    """Return the version of an installed package, or that it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"NOT INSTALLED, left out (pip install --no-deps {package})"


def main() -> int:
    """Run the parts and return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"any of {', '.join(PARTS)}; none: all")
    wanted = parser.parse_args().parts or list(PARTS)
    unknown = [part for part in wanted if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]}, only {', '.join(PARTS)}")
    for package, role in PEERS.items():
        print(f"{package:18s} {version_of(package):14s} {role}")
    failed = []
    for part in wanted:
        script, *arguments = PARTS[part]
        print(f"\n== {part}: benchmarks/{' '.join((script, *arguments))}", flush=True)
        if subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *arguments]).returncode:
            failed.append(part)
            print(f"== {part} FAILED", flush=True)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
