"""Assembly of training and evaluation runs from MONAI's engines, and the folder in which a run explains itself."""

from pipelines.training.averaging import averaged_network
from pipelines.training.checkpoints import load_weights, read_contract, read_header, save_weights, start_from
from pipelines.training.datasets import PatchDataset, VolumeDataset, crop_with_margin
from pipelines.training.engines import (
    device_of,
    patch_loader,
    supervised_trainer,
    train,
    training_inferer,
    validator_or_none,
)
from pipelines.training.evaluation import CaseMetrics, ReportCases
from pipelines.training.landmarks import read_landmarks
from pipelines.training.results import find_checkpoint, prediction_folder, results_folder, source_of
from pipelines.training.run_folder import create_run, refuse_existing_run
from pipelines.training.validation import ValidationDice

__all__ = [
    "CaseMetrics",
    "PatchDataset",
    "ReportCases",
    "ValidationDice",
    "VolumeDataset",
    "averaged_network",
    "create_run",
    "crop_with_margin",
    "device_of",
    "find_checkpoint",
    "load_weights",
    "patch_loader",
    "prediction_folder",
    "read_contract",
    "read_header",
    "read_landmarks",
    "refuse_existing_run",
    "results_folder",
    "save_weights",
    "source_of",
    "start_from",
    "supervised_trainer",
    "train",
    "training_inferer",
    "validator_or_none",
]
