"""A misspelt option is an error that names the right one: tried on every hyper-parameter of the lesion bundle.

And on more than fifty misspelt names at every depth, over every configuration of both bundles.
"""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser

from pipelines.preflight.components import FORWARDED, accepted_arguments, located
from pipelines.preflight.configuration import (
    faults,
    lint,
    referenced_keys,
    refuse_absent_references,
    refuse_unknown_overrides,
)
from pipelines.preflight.keys import bundle_files, duplicate_keys
from pipelines.runner import BUNDLES, bundle_parser, working_directory
from transforms.errors import BundleError, FiducialError, UsageError

ROOT = BUNDLES / "brain_lesion_mri_segmentation"


def resolved(*files: str) -> dict[str, Any]:
    with working_directory(ROOT):
        parser = ConfigParser()
        parser.read_config([f"configs/{file}.yaml" for file in files])
        parser.parse()
        return {key: value for key, value in parser.get().items() if key != "_meta_"}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return resolved("train")


def options(config: dict[str, Any]) -> list[str]:
    """Return the hyper-parameters: what stands above the line of ``train.yaml`` and holds a plain value."""
    return [k for k, v in config.items() if not isinstance(v, dict) and not str(v).startswith(("$", "%", "@", "['$"))]


def typos(key: str) -> Iterator[str]:
    middle = len(key) // 2
    yield key[:middle] + key[middle + 1 :]
    yield key[:middle] + key[middle + 1] + key[middle] + key[middle + 2 :] if middle + 2 <= len(key) else key + "x"
    yield key[:-1] + key[-1] * 2
    yield key[1:]


def test_every_misspelt_option_is_refused_and_nearly_always_corrected(config: dict[str, Any]) -> None:
    tried, corrected = 0, 0
    for key in options(config):
        for typo in typos(key):
            if typo in config:
                continue
            with pytest.raises(UsageError) as caught:
                lint({**config, typo: 5})
            assert repr(typo) in caught.value.what
            tried += 1
            corrected += caught.value.fix == f"did you mean --{key}?"
    assert tried >= 100
    assert corrected / tried >= 0.9


@pytest.mark.parametrize("key", ["max_epoch", "val_intervall", "flip_axis", "mainfest"])
def test_common_ones(config: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError, match=key):
        lint({**config, key: 5})


@pytest.mark.parametrize("files", [("train",), ("evaluate",), ("inference",), ("train", "variant_2_5d")])
def test_the_bundle_itself_passes_with_all_its_keys(files: tuple[str, ...]) -> None:
    config = resolved(*files)
    assert len(config) > 20
    lint(config)


def test_every_option_of_the_bundle_can_be_overridden(config: dict[str, Any]) -> None:
    assert len(options(config)) > 30
    for key in options(config):
        lint({**config, key: 1})


@pytest.mark.parametrize("text", ["false", "False ", "TRUE", "null"])
def test_words_of_yaml_on_the_command_line_are_refused(config: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match="key 'bias_correction' has the text") as caught:
        lint({**config, "bias_correction": text})
    right = {"false": "False", "true": "True", "null": "None"}[text.strip().lower()]
    assert caught.value.fix == f"write --bias_correction {right}"


def test_real_booleans_and_none_pass(config: dict[str, Any]) -> None:
    lint({**config, "bias_correction": True, "filters": None})


def test_a_reference_to_nothing_is_refused_with_the_nearest(config: dict[str, Any]) -> None:
    wrong = {**config, "average": "$training.averaged_network(@netwrk, @ema_decay)"}
    with pytest.raises(BundleError, match="@netwrk") as caught:
        refuse_absent_references(wrong)
    assert caught.value.fix == "did you mean @network?"
    with pytest.raises(BundleError):
        lint(wrong)
    with pytest.raises(BundleError, match="@absent"):
        lint({**config, "device": "@absent"})


def test_an_at_sign_inside_a_text_is_no_reference(config: dict[str, Any]) -> None:
    lint({**config, "manifest": "/data/@archive/cohort.json"})
    lint({**config, "run_name": "me@hospital"})
    assert list(referenced_keys({"a": "x@b", "c": ["$f(@d) + @e::x", "@f#0"], "g": "@g"})) == ["d", "e", "f"]


def test_a_key_that_only_refers_to_itself_is_unread(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="'lonely'"):
        lint({**config, "lonely": {"a": "$@lonely['b']"}})


def test_the_parser_of_a_bundle_is_linted(tmp_path: Path) -> None:
    before = Path.cwd()
    with bundle_parser(ROOT.name, "train", {"max_epochs": 3}) as parser:
        assert parser.get("max_epochs") == 3
        assert Path.cwd() == ROOT
    with pytest.raises(UsageError, match="max_epoch"), bundle_parser(str(ROOT), "train", {"max_epoch": 3}):
        pass
    assert Path.cwd() == before
    with pytest.raises(BundleError, match="not found"), bundle_parser("brain_tumour", "train", {}):
        pass
    with pytest.raises(BundleError, match=r"no configs/none.yaml"), bundle_parser(str(ROOT), "none", {}):
        pass


# --- fifty typos and more, over both bundles and every configuration of theirs

LESION, FUSION = ROOT, BUNDLES / "head_mri_ct_fusion"
EVERY_CONFIGURATION = [
    *((LESION, files) for files in (("train",), ("evaluate",), ("inference",))),
    *((LESION, ("train", delta)) for delta in ("variant_2_5d", "multi_gpu_train")),
    *((FUSION, files) for files in (("train",), ("evaluate",), ("inference",), ("train_lesion_head",))),
    (FUSION, ("train", "multi_gpu_train")),
]


@cache
def _read(root: Path, files: tuple[str, ...]) -> dict[str, Any]:
    with working_directory(root):
        return ConfigParser.load_config_files([f"configs/{file}.yaml" for file in files])


@cache
def _resolved(root: Path, files: tuple[str, ...]) -> dict[str, Any]:
    with working_directory(root):
        parser = ConfigParser(deepcopy(_read(root, files)))
        parser.parse()
        return parser.get()


def as_read(root: Path, files: tuple[str, ...]) -> dict[str, Any]:
    """Return the files of a configuration as one, macros not resolved; the caller may change it."""
    return deepcopy(_read(root, files))


def as_resolved(root: Path, files: tuple[str, ...]) -> dict[str, Any]:
    return deepcopy(_resolved(root, files))


def overridden(root: Path, files: tuple[str, ...], overrides: dict[str, Any]) -> FiducialError | None:
    """Return what is said of a run with these overrides, given as on the command line of MONAI."""
    with working_directory(root):
        parser = ConfigParser(as_read(root, files))
        try:
            refuse_unknown_overrides(parser.get(), overrides)
            parser.update(overrides)
            parser.parse()
            lint(parser.get())
        except FiducialError as error:
            return error
    return None


def edited(root: Path, files: tuple[str, ...], place: str, to: str) -> FiducialError | None:
    """Return what is said of a file in which the key at ``place`` is written ``to``; or, with ``=``, its value."""
    config = as_resolved(root, files)
    *path, last = place.split("::")
    owner = config
    for part in path:
        owner = owner[int(part) if isinstance(owner, list) else part]
    if to.startswith("="):
        owner[int(last) if isinstance(owner, list) else last] = to[1:]
    else:
        owner[to] = owner.pop(last)
    with working_directory(root):
        try:
            lint(config)
        except FiducialError as error:
            return error
    return None


T, E, INF, V, M, H = (
    ("train",),
    ("evaluate",),
    ("inference",),
    ("train", "variant_2_5d"),
    ("train", "multi_gpu_train"),
    ("train_lesion_head",),
)
OVERRIDES = [  # bundle, configuration, what is typed, the nearest that is meant
    (LESION, T, "max_epoch", "max_epochs"),
    (LESION, T, "lerning_rate", "learning_rate"),
    (LESION, T, "batchsize", "batch_size"),
    (LESION, T, "patchsize", "patch_size"),
    (LESION, T, "cahce_dir", "cache_dir"),
    (LESION, T, "run_nam", "run_name"),
    (LESION, T, "loging_file", "logging_file"),
    (LESION, T, "acknowlege", "acknowledge"),
    (LESION, T, "train#trainer#max_epochz", "max_epochs"),
    (LESION, T, "train::trainer::clip_nrom", "clip_norm"),
    (LESION, T, "train#trainr#max_epochs", "trainer"),
    (LESION, T, "trian#trainer#max_epochs", "train"),
    (LESION, T, "train#dataset#foreground_probabilty", "foreground_probability"),
    (LESION, T, "train#datset", "dataset"),
    (LESION, T, "validate#key_metrics", "key_metric"),
    (LESION, T, "validate#evaluater", "evaluator"),
    (LESION, T, "optimizer#weight_decai", "weight_decay"),
    (LESION, T, "plan#max_epoch", "max_epochs"),
    (LESION, T, "contract#clip_percentile", "clip_percentiles"),
    (LESION, T, "inspection#validations", "validation"),
    (LESION, E, "splitt", "split"),
    (LESION, E, "nsd_tolerance", "nsd_tolerance_mm"),
    (LESION, E, "flip_axis", "flip_axes"),
    (LESION, E, "callibration", "calibration"),
    (LESION, INF, "outptu_dir", "output_dir"),
    (LESION, INF, "minimum_lesion_mm", "minimum_lesion_mm3"),
    (LESION, V, "stack_slice", "stack_slices"),
    (LESION, V, "dimension", "dimensions"),
    (LESION, M, "accumulation_step", "accumulation_steps"),
    (FUSION, T, "shedule", "schedule"),
    (FUSION, T, "roi_wieght", "roi_weight"),
    (FUSION, T, "validation_severty", "validation_severity"),
    (FUSION, T, "loss#roi_weigth", "roi_weight"),
    (FUSION, T, "train#trainer#mindelta", "min_delta"),
    (FUSION, E, "sampling_step", "sampling_steps"),
    (FUSION, E, "shift_mm", "shifts_mm"),
    (FUSION, E, "compare_wiht", "compare_with"),
    (FUSION, INF, "sample", "samples"),
    (FUSION, H, "target_probabilty", "target_probability"),
    (FUSION, H, "val_intervall", "val_interval"),
    (FUSION, M, "preset_", "preset"),
]  # fmt: skip
EDITS = [  # bundle, configuration, place, how it is written instead, the typo, the nearest
    (LESION, T, "train::dataset::crop_size", "crop_sise", "crop_sise", "crop_size"),
    (LESION, T, "train::preprocessing::transforms::0::prob", "probability", "probability", "prob"),
    (LESION, T, "train::preprocessing::transforms::2::rotate_range", "rotate_ranges", "rotate_ranges", "rotate_range"),
    (LESION, T, "train::preprocessing::transforms::3::_target_", "=RandFlippd", "RandFlippd", "RandFlipd"),
    (LESION, T, "train::trainer::_target_", "=pipelines.training.TrainingRum", "TrainingRum", "TrainingRun"),
    (LESION, T, "train::inferer", "=$trainig.training_inferer(@arithmetic)", "trainig", "training"),
    (LESION, T, "train::inferer", "=$training.trainin_inferer(@arithmetic)", "trainin_inferer", "training_inferer"),
    (LESION, T, "cohort", "=$manifests.load_manifest(@manifest, chek=@check_files, root=@data_root)", "chek", "check"),
    (LESION, T, "imports::0", "=$import transfroms", "transfroms", "transforms"),
    (LESION, T, "validate::dataloader::num_workers", "num_worker", "num_worker", "num_workers"),
    (LESION, T, "validate::evaluator::val_data_loader", "val_dataloader", "val_dataloader", "val_data_loader"),
    (LESION, T, "validate::evaluator::key_val_metric", "=@validate#key_metrik", "key_metrik", "key_metric"),
    (LESION, T, "network", "=$training.start_from(@network_deff, '', @contract)", "network_deff", "network_def"),
    (LESION, T, "network_def::patch_size", "=$@contract['patch_sizes']", "patch_sizes", "patch_size"),
    (LESION, T, "plan::warmup_epochs", "warmup_epoch", "warmup_epoch", "warmup_epochs"),
    (LESION, E, "sliding_window::overlap", "overlaps", "overlaps", "overlap"),
    (LESION, E, "most_probable_label::argmax", "arg_max", "arg_max", "argmax"),
    (LESION, E, "handlers::0::_target_", "=pipelines.training.CaseMetric", "CaseMetric", "CaseMetrics"),
    (LESION, INF, "handlers::0::folder", "foldr", "foldr", "folder"),
    (LESION, V, "network_def::stack_slices", "stackslices", "stackslices", "stack_slices"),
    (LESION, M, "finalize::0", "=$training.leave_proceses()", "leave_proceses", "leave_processes"),
    (FUSION, T, "loss::spacing_mm", "spacing", "spacing", "spacing_mm"),
    (FUSION, T, "train::preprocessing::transforms::3::severity", "severitys", "severitys", "severity"),
    (FUSION, E, "handlers::0::compare_with", "compare_whit", "compare_whit", "compare_with"),
    (FUSION, INF, "postprocessing::nearest_interp", "nearest_interpol", "nearest_interpol", "nearest_interp"),
    (FUSION, H, "network::filters", "filter", "filter", "filters"),
    (FUSION, H, "validate::preprocessing::transforms::1::keys", "key", "key", "keys"),
]  # fmt: skip


def test_the_table_of_typos_covers_both_bundles_and_every_configuration() -> None:
    tried = {(root, files) for root, files, *_ in [*OVERRIDES, *EDITS]}
    assert tried == set(EVERY_CONFIGURATION)
    assert len({(root, files, typo) for root, files, typo, _ in OVERRIDES}) + len(EDITS) >= 50


@pytest.mark.parametrize(("root", "files", "typed", "meant"), OVERRIDES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_misspelt_override_is_named_with_the_nearest(
    root: Path, files: tuple[str, ...], typed: str, meant: str
) -> None:
    error = overridden(root, files, {typed: 3})
    assert error is not None
    assert re.split("::|#", typed)[-1] in error.what + error.why or typed in error.what
    assert error.fix.startswith("did you mean")
    assert meant in error.fix


@pytest.mark.parametrize(
    ("root", "files", "place", "to", "typo", "meant"), EDITS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_misspelt_name_in_a_file_is_named_with_the_nearest(
    root: Path, files: tuple[str, ...], place: str, to: str, typo: str, meant: str
) -> None:
    error = edited(root, files, place, to)
    assert error is not None
    assert typo in error.what + error.why
    assert error.fix.startswith("did you mean")
    assert meant in error.fix


@pytest.mark.parametrize(
    ("root", "files"), EVERY_CONFIGURATION, ids=lambda v: "+".join(v) if isinstance(v, tuple) else v.name
)
def test_every_configuration_of_both_bundles_passes(root: Path, files: tuple[str, ...]) -> None:
    with working_directory(root):
        config = as_resolved(root, files)
        assert len(config) > 20
        assert list(faults(config)) == []
        assert len(bundle_files(config)) >= 6  # their keys were looked at, too


@pytest.mark.parametrize(
    ("root", "typed", "value"),
    [
        (LESION, "train#trainer#knobs", "take less"),  # an argument that the file leaves to its default
        (LESION, "train#preprocessing#transforms#0#prob", 0.1),
        (LESION, "validate#dataloader#pin_memory", True),
        (FUSION, "loss#delta_boundary", 0.1),
    ],
)
def test_overrides_of_what_is_there_pass(root: Path, typed: str, value: Any) -> None:
    assert overridden(root, T, {typed: value}) is None


def test_an_override_into_a_macro_says_that_it_cannot_be() -> None:
    error = overridden(LESION, T, {"network_def#filters": [4, 8]})
    assert error is not None
    assert "%configs/common.yaml::network_def" in error.what
    assert error.exit_code == 2


def test_texts_of_yaml_deep_in_a_block_are_refused() -> None:
    error = overridden(LESION, T, {"validate#dataloader#pin_memory": "false"})
    assert error is not None
    assert error.what == "key 'validate::dataloader::pin_memory' has the text 'false'"


# --- what is no typo


def test_a_key_that_stands_twice_is_found_with_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text(
        "seed: 0\ntrain:\n  trainer:\n    workers: 0\n    clip_norm: 1\n    workers: 4\nval: [{a: 1, a: 2}]\n"
    )
    # lines:                    1  2      3          4              5                6             7
    first, second = duplicate_keys([file])
    assert (first.what, first.why) == (
        f"{file}: key 'train::trainer::workers' stands twice",
        "in lines 4 and 6; only the last counts",
    )
    assert "'val::0::a'" in second.what
    with pytest.raises(BundleError, match="stands twice"):
        lint(resolved("train"), files=[file])
    file.write_text('{\n\t"a": {"b": 1, "c": 2, "b": 3}\n}')
    (json_fault,) = duplicate_keys([file.rename(tmp_path / "twice.json")])
    assert "'a::b'" in json_fault.what
    (unreadable,) = duplicate_keys([tmp_path / "absent.yaml"])
    assert "cannot be read" in unreadable.what


def test_a_duplicate_in_a_file_of_the_bundle_stops_its_run(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    common = tmp_path / "configs" / "common.yaml"
    common.write_text(common.read_text().replace("  uncertainty:", "  inferer: null\n  uncertainty:", 1))
    with pytest.raises(BundleError, match="'inferer::inferer' stands twice"), bundle_parser(str(tmp_path), "train", {}):
        pass


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("cucim.core.Resize", "the package 'cucim' is not installed"),
        ("monai.networks.nets.DynUnett", "monai.networks.nets has no 'DynUnett'"),
        ("NoSuchTransformOfMonaid", "MONAI has no class"),
    ],
)
def test_a_component_that_is_not_there(config: dict[str, Any], target: str, why: str) -> None:
    with pytest.raises(BundleError, match=target) as caught:
        lint({**config, "network_def": {"_target_": target}})
    assert why in caught.value.why


def test_a_missing_package_is_named_with_what_imports_it(config: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="import cucim") as caught:
        lint({**config, "imports": [*config["imports"], "$import cucim"]})
    assert caught.value.fix.startswith("install cucim")


@pytest.mark.parametrize(("disabled", "refused"), [(True, True), ("$@compiled", False), ("$not @compiled", True)])
def test_a_reference_to_a_disabled_component(config: dict[str, Any], disabled: Any, refused: bool) -> None:
    smooth = {"_target_": "GaussianSmoothd", "_disabled_": disabled, "keys": "image"}
    wrong = {**config, "smooth": smooth, "preparation": {"_target_": "Compose", "transforms": ["@smooth"]}}
    found = [fault for fault in faults(wrong) if "disabled" in fault.what]
    assert [fault.what for fault in found] == ["preparation refers to @smooth, which is disabled"] * refused


@pytest.mark.parametrize(
    ("handler", "asked"),
    [
        ({"_target_": "MetricsSaver", "save_dir": "x", "metrics": ["mean_dise"]}, "mean_dise"),
        ({"_target_": "CheckpointSaver", "save_dir": "x", "key_metric_name": "val_mean_dice"}, "val_mean_dice"),
        (
            {
                "_target_": "EarlyStopHandler",
                "patience": 3,
                "score_function": "$monai.handlers.stopping_fn_from_metric('dice')",
            },
            "dice",
        ),
    ],
)
def test_a_metric_that_nobody_computes(config: dict[str, Any], handler: dict[str, Any], asked: str) -> None:
    wrong = deepcopy(config)
    wrong["validate"]["handlers"] = [handler]
    with pytest.raises(BundleError, match=asked) as caught:
        lint(wrong)
    assert "mean_dice" in caught.value.why
    right = yaml.safe_load(yaml.safe_dump(handler).replace(asked, "mean_dice", 1))
    wrong["validate"]["handlers"] = [right, {"_target_": "MetricsSaver", "save_dir": "x", "metrics": "*"}]
    lint(wrong)


def test_a_block_that_takes_anything_is_read_by_likeness_alone(config: dict[str, Any]) -> None:
    """AsDiscreted hands its further arguments on, so only what nearly is one of its own can be told to be wrong."""
    block = {"_target_": "AsDiscreted", "keys": "pred", "argmax": True}
    lint({**config, "network_def": {**block, "dim": 1}})
    with pytest.raises(BundleError, match="'treshold'"):
        lint({**config, "network_def": {**block, "treshold": 0.5}})


@pytest.mark.parametrize(("function", "receiver"), FORWARDED.items())
def test_functions_that_hand_arguments_on_are_known_with_their_receiver(function: str, receiver: str) -> None:
    names, is_open = accepted_arguments(located(function))
    assert not is_open
    assert set(accepted_arguments(located(receiver))[0]) < set(names)
    assert any(p.kind is p.VAR_KEYWORD for p in inspect.signature(located(function)).parameters.values())


def test_expressions_with_names_of_their_own_pass(config: dict[str, Any]) -> None:
    def with_step(step: str) -> dict[str, Any]:
        return {**config, "run": [*config["run"], step]}

    lint(with_step("$[torch.device(f'cpu:{n}') for n in range(2)] or monai.utils.ensure_tuple(np.pi)"))
    with pytest.raises(BundleError, match="'lambada'"):
        lint(with_step("$[lambada(n) for n in range(2)]"))
    with pytest.raises(BundleError) as caught:
        lint(with_step("$(1, "))
    assert caught.value.fix == "correct the expression"


def test_a_component_in_the_root_of_the_bundle_is_found(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "layers_of_a_bundle.py").write_text("class Net:\n    def __init__(self, width=1): ...\n")
    before = list(sys.path)
    with working_directory(tmp_path):
        lint({**config, "network_def": {"_target_": "layers_of_a_bundle.Net", "width": 3}})
        with pytest.raises(BundleError, match="'widht'") as caught:
            lint({**config, "network_def": {"_target_": "layers_of_a_bundle.Net", "widht": 3}})
    assert caught.value.fix == "did you mean 'width'?"
    assert sys.path == before


EXPRESSIONS = ["$@a['b']", "$1 +", "$import nothing", "$x.y(z=1)", "$\x00"]
TEXTS = st.sampled_from(["@a", "@a#b", "@a::0", *EXPRESSIONS, "%a", "true", "", "a..b", "Compose"])
KEYS = st.sampled_from(["a", "b", "_target_", "_disabled_", "metrics", "key_metric", "train"]) | st.integers(0, 2)
CONFIGURATIONS = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, database=None)
@given(st.dictionaries(st.sampled_from(["a", "b", "train", "validate", "run"]), CONFIGURATIONS, max_size=4))
def test_whatever_a_configuration_holds_its_faults_are_told_in_three_lines(config: dict[str, Any]) -> None:
    for fault in faults(config, files=[]):
        assert fault.what
        assert fault.why
        assert fault.fix
