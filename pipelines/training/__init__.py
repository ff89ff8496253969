"""Assembly of training and evaluation runs from MONAI's engines, and the folder in which a run explains itself."""

from pipelines.training.averaging import averaged_network
from pipelines.training.checkpoints import load_weights, read_contract, read_header, save_weights, start_from
from pipelines.training.datasets import PatchDataset, VolumeDataset, crop_with_margin
from pipelines.training.distributed import join_processes, leave_processes
from pipelines.training.engines import device_of, training_inferer, validator_or_none
from pipelines.training.ensembles import common_contract, load_members, refuse_seen_cases
from pipelines.training.evaluation import CaseCalibration, CaseMetrics, ReportCases
from pipelines.training.fusion import ValidationFusion, fusion_pictures, load_lesion_head
from pipelines.training.fusion_evaluation import FusionCases, at_severities, lesion_reader
from pipelines.training.landmarks import read_landmarks
from pipelines.training.phases import plan_phases
from pipelines.training.results import find_checkpoint, find_weights, prediction_folder, results_folder, source_of
from pipelines.training.resume import open_run
from pipelines.training.run import TrainingRun
from pipelines.training.run_folder import refuse_existing_run
from pipelines.training.tracking import store_uri
from pipelines.training.validation import ValidationDice

__all__ = [
    "CaseCalibration",
    "CaseMetrics",
    "FusionCases",
    "PatchDataset",
    "ReportCases",
    "TrainingRun",
    "ValidationDice",
    "ValidationFusion",
    "VolumeDataset",
    "at_severities",
    "averaged_network",
    "common_contract",
    "crop_with_margin",
    "device_of",
    "find_checkpoint",
    "find_weights",
    "fusion_pictures",
    "join_processes",
    "leave_processes",
    "lesion_reader",
    "load_lesion_head",
    "load_members",
    "load_weights",
    "open_run",
    "plan_phases",
    "prediction_folder",
    "read_contract",
    "read_header",
    "read_landmarks",
    "refuse_existing_run",
    "refuse_seen_cases",
    "results_folder",
    "save_weights",
    "source_of",
    "start_from",
    "store_uri",
    "training_inferer",
    "validator_or_none",
]
