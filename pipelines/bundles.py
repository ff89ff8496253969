"""What every bundle does first, under MONAI's own command as under ours: explain errors, lint, fix the seeds.

``initialize`` of each configuration calls ``begin()``. MONAI hands an expression no reference to the configuration that
it stands in, so ``begin`` looks it up in the calling workflow; nothing else here depends on who started the run.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.utils import set_determinism

from pipelines.explain import explain_errors
from pipelines.manifests import Manifest
from pipelines.preflight.configuration import lint
from pipelines.training.distributed import is_main_process, refuse_unjoined_processes, world_size
from pipelines.training.resume import refuse_other_setup
from pipelines.training.run_folder import environment, write_record
from transforms.errors import BundleError

logger = logging.getLogger(__name__)

QUIET_LOGGERS = ("ignite", "monai.engines", "monai.bundle", "matplotlib", "PIL")


def begin(seed: int = 0) -> None:
    """Prepare a bundle's run: three-line errors, the lint, seeds of Python, NumPy and torch.

    Raises:
        UsageError, BundleError: from the lint.
    """
    explain_errors()
    refuse_unjoined_processes()
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    # MONAI's surface Dice calls its own deprecated argument; a user can do nothing about it
    warnings.filterwarnings("ignore", message=".*always_return_as_numpy.*", category=FutureWarning)
    lint(calling_config())
    set_determinism(seed=seed)


def record_run(folder: str | Path, cohort: Manifest, resume_despite: Sequence[str] = (), **record: Any) -> None:
    """Write the resolved configuration and the record of a new run into its folder.

    Where the run was interrupted and now goes on, they are compared instead (``refuse_other_setup``).

    Args:
        folder: of the run, from ``open_run``.
        cohort: that it trains on.
        resume_despite: kinds of difference that the user accepts.
        record: what else stands in ``record.json``.

    Raises:
        BundleError: the run cannot go on exactly.
    """
    if not is_main_process():
        return
    data = {"manifest": str(cohort.path), "manifest_digest": cohort.digest, "cohort": cohort.name}
    content = {**environment(), **data, **record}
    if (Path(folder) / "record.json").is_file():
        refuse_other_setup(Path(folder), calling_config(), content, resume_despite)
    else:
        write_record(Path(folder), calling_config(), content)


def machine(device: torch.device, precision: str) -> dict[str, Any]:
    """Return what decides the last bits of a result beside the code: kind of device, arithmetic, processes, threads."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": precision,
        "processes": world_size(),
        "threads": torch.get_num_threads(),
    }


def calling_config() -> Mapping[str, Any]:
    """Return the configuration (macros and overrides resolved) of the bundle that is calling.

    Raises:
        BundleError: nobody up the stack is a MONAI workflow.
    """
    frame = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, ConfigWorkflow):
            owner = owner.parser
        if isinstance(owner, ConfigParser):
            config = owner.get()
            return {key: value for key, value in config.items() if key != "_meta_"}
        frame = frame.f_back  # type: ignore[assignment]
    raise BundleError(
        "no bundle is running", "this is called from a bundle's configuration", "run it with monai.bundle"
    )
