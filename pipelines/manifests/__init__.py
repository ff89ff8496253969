"""The data manifest: one JSON file that names a cohort's files, labels and stored split, each with its digest.

An importer reads every file once and writes the manifest; training, evaluation and reports only ever read it.
"""

from pipelines.manifests.discover import items_from_path
from pipelines.manifests.folder import import_folder
from pipelines.manifests.labels import label_table, parse_label
from pipelines.manifests.load import case_items, load_manifest, write_manifest
from pipelines.manifests.model import Case, FileEntry, Label, LeftOut, Manifest, Modality, Splits
from pipelines.manifests.msd import import_msd
from pipelines.manifests.nnunet import import_nnunet
from pipelines.manifests.selection import (
    chosen_modalities,
    contract_items,
    contract_labels,
    foreground_source,
    labels_of,
    pair_items,
    prediction_items,
    reference_items,
)
from pipelines.manifests.splits import SplitPlan, assign_folds, explicit_split, split_subjects
from pipelines.manifests.validate import validate_manifest

__all__ = [
    "Case",
    "FileEntry",
    "Label",
    "LeftOut",
    "Manifest",
    "Modality",
    "SplitPlan",
    "Splits",
    "assign_folds",
    "case_items",
    "chosen_modalities",
    "contract_items",
    "contract_labels",
    "explicit_split",
    "foreground_source",
    "import_folder",
    "import_msd",
    "import_nnunet",
    "items_from_path",
    "label_table",
    "labels_of",
    "load_manifest",
    "pair_items",
    "parse_label",
    "prediction_items",
    "reference_items",
    "split_subjects",
    "validate_manifest",
    "write_manifest",
]
