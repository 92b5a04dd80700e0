"""The commands as functions: the same settings, defaults, faults and results.

Every function takes the settings of its command as keywords (see `retinaray.api.settings`), and
`config=`: a YAML file as `--config` takes it, or its content. It returns what the command prints:
an object with the figures as attributes, with `to_text()` for people and `to_json()` for machines.
What a wrong setting raises is ConfigError, with all faults at once; what else may happen is listed
at the runner of each command.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from retinaray.api.settings import Config, make_job

if TYPE_CHECKING:
    from retinaray.api.model import Model
    from retinaray.assembly.anchors import AnchorsOutcome
    from retinaray.assembly.doctor import DoctorOutcome
    from retinaray.assembly.evaluation import EvaluateOutcome
    from retinaray.assembly.export import ExportOutcome
    from retinaray.assembly.parity import ParityOutcome
    from retinaray.assembly.report import ReportOutcome
    from retinaray.assembly.thresholds import ThresholdsOutcome
    from retinaray.cli import Outcome
    from retinaray.distributed.infer_outcome import InferOutcome
    from retinaray.distributed.train import TrainOutcome
    from retinaray.distributed.tune import SweepOutcome

Location = str | os.PathLike[str]
"""A local path or a URI."""

_ENDPOINT = "reading.endpoint_url"


def train(config: Config = None, **settings: Any) -> TrainOutcome:
    """Train a RetinaNet with Ray Train and keep the best weights, as `retinaray train`.

    Args:
        config: Settings to start from.
        settings: `output="model.pth"` and `annotations="train.json"` at least.

    Returns:
        `model` (path of the weights), `run_folder`, `metrics` of the kept weights, `steps`,
        `seconds`.

    Raises:
        RetinarayError: See `run_training`.
        KeyboardInterrupt: After an interrupt, when a checkpoint is kept.
    """
    from retinaray.config.training_schema import TrainJob
    from retinaray.distributed.train import run_training

    return run_training(make_job(TrainJob, settings, config=config))


def tune(config: Config = None, **settings: Any) -> SweepOutcome:
    """Search anchors and other settings by validation AP, as `retinaray tune`.

    Args:
        config: Settings to start from.
        settings: Those of `train`, `output="sweep"` and
            `space={"anchors.base_scale": {"uniform": [2, 4]}}`.

    Returns:
        `best` trial, `model` (its weights), `config` (its settings), `trials` by status, `table`.

    Raises:
        RetinarayError: See `run_sweep`.
    """
    from retinaray.config.sweep_schema import TuneJob
    from retinaray.distributed.tune import run_sweep

    return run_sweep(make_job(TuneJob, settings, config=config))


def evaluate(
    model: Model | Location,
    images: Location,
    annotations: Location,
    *,
    config: Config = None,
    **settings: Any,
) -> EvaluateOutcome:
    """Score a model, or a file of detections, against ground truth, as `retinaray evaluate`.

    Args:
        model: A model file, a `detections.json`, or a loaded model, which stands for its file and
            the settings that it was loaded with.
        images: Folder or S3 prefix of the images.
        annotations: COCO JSON.
        config: Settings to start from.
        settings: Other settings of the command.

    Returns:
        `scores.summary` (COCO's twelve numbers by name), `scores.classes`, `num_errors`,
        `images_per_s`, `points` (precision and recall at the model's own thresholds).

    Raises:
        RetinarayError: See `run_evaluation`.
    """
    from retinaray.assembly.evaluation import run_evaluation
    from retinaray.config.inference_schema import EvaluateJob

    base = {**_as_loaded(model), "images": os.fspath(images), "annotations": os.fspath(annotations)}
    return run_evaluation(make_job(EvaluateJob, settings, config=config, base=base))


def choose_thresholds(
    model: Model | Location,
    images: Location,
    annotations: Location,
    *,
    config: Config = None,
    **settings: Any,
) -> ThresholdsOutcome:
    """Choose score thresholds and NMS on validation images, as `retinaray thresholds`.

    Args:
        model: A `.pth` or `.onnx` file, or a loaded model; see `evaluate`.
        images: Folder or S3 prefix of the validation images.
        annotations: COCO JSON of the validation set.
        config: Settings to start from.
        settings: Other settings of the command: `rule="precision=0.9"`, `output="tuned.pth"`.

    Returns:
        `best` (suppression by AP), `validation.points` (a threshold per class, and what it gives),
        `test`, `output`.

    Raises:
        RetinarayError: See `run_thresholds`.
    """
    from retinaray.assembly.thresholds import run_thresholds
    from retinaray.config.inference_schema import ThresholdsJob

    base = {**_as_loaded(model), "images": os.fspath(images), "annotations": os.fspath(annotations)}
    return run_thresholds(make_job(ThresholdsJob, settings, config=config, base=base))


def infer(
    model: Model | Location, images: Location, *, config: Config = None, **settings: Any
) -> InferOutcome:
    """Run a model over very many images with Ray Data, as `retinaray infer`.

    Args:
        model: A model file, or a loaded model; see `evaluate`.
        images: Folder, S3 prefix, list, tars or COCO JSON.
        config: Settings to start from.
        settings: Other settings of the command: `output="detections.json"`, `workers=4`.

    Returns:
        `detections` (the merged file), `run` (the run's folder), `totals`, `errors` (the first
        few), `images_per_s`, `scores` with annotations.

    Raises:
        RetinarayError: See `run_inference`.
    """
    from retinaray.config.batch_schema import InferJob
    from retinaray.distributed.batch_inference import run_inference

    base = {**_as_loaded(model), "images": os.fspath(images)}
    return run_inference(make_job(InferJob, settings, config=config, base=base))


def export_model(
    model: Model | Location, output: Location, *, config: Config = None, **settings: Any
) -> ExportOutcome:
    """Write a model as ONNX or a TensorRT engine, as `retinaray export`.

    Args:
        model: A `.pth` file, or a model that was loaded from one.
        output: A name that ends in `.onnx`, `.plan` or `.engine`; it is written only if the boxes
            found in it are those of torch.
        config: Settings to start from.
        settings: Other settings of the command: `precision="fp16"`, `size=(480, 640)`.

    Returns:
        `output`, `canvas`, `kind`, `num_bytes`, `sha256`, `parity` (how far its boxes lie from
        torch's).

    Raises:
        RetinarayError: See `run_export`.
    """
    from retinaray.assembly.export import run_export
    from retinaray.config.export_schema import ExportJob

    base = {**_as_file(model), "output": os.fspath(output)}
    return run_export(make_job(ExportJob, settings, config=config, base=base))


def compare_runtimes(
    model: Model | Location,
    files: Location | Sequence[Location],
    images: Location,
    *,
    config: Config = None,
    **settings: Any,
) -> ParityOutcome:
    """Compare exported files with their weights on every runtime here, as `retinaray parity`.

    Args:
        model: A `.pth` file, or a model that was loaded from one.
        files: Exported files, one or several.
        images: Images like those that the model will see.
        config: Settings to start from.
        settings: Other settings of the command: `annotations="test.json"`, `report="parity.html"`.

    Returns:
        `result.rows` (differences and latency of each case), `result.has_passed`, `report`.

    Raises:
        RetinarayError: See `run_parity`.
    """
    from retinaray.assembly.parity import run_parity
    from retinaray.config.parity_schema import ParityJob

    base = {**_as_file(model), "files": _list(files), "images": os.fspath(images)}
    return run_parity(make_job(ParityJob, settings, config=config, base=base))


def anchor_coverage(
    annotations: Location, *, config: Config = None, **settings: Any
) -> AnchorsOutcome:
    """Say which ground truth the anchors reach, as `retinaray anchors`.

    Args:
        annotations: COCO JSON of the training set.
        config: Settings to start from.
        settings: Other settings of the command: `resize`, `max_size`, `anchor_scales`, and
            `fit=True` to propose better anchors. `picture=None` leaves the heat map out.

    Returns:
        `report` (`all`, `by_class`, `by_size`, `by_ratio`), `num_unmatched`, `picture`, and with
        `fit=True` `fit.chosen` (`scales`, `ratios`, `levels`, `size`).

    Raises:
        RetinarayError: See `run_anchors`.
    """
    from retinaray.assembly.anchors import run_anchors
    from retinaray.config.sweep_schema import AnchorsJob

    base = {"annotations": os.fspath(annotations)}
    return run_anchors(make_job(AnchorsJob, settings, config=config, base=base))


def check_dataset(
    annotations: Location, *, config: Config = None, **settings: Any
) -> DoctorOutcome:
    """Look for every known fault of a COCO data set, as `retinaray doctor`.

    Args:
        annotations: COCO JSON.
        config: Settings to start from.
        settings: Other settings of the command: `images="photos"`, `fix="repaired.json"`.

    Returns:
        `report` (`faults`, `is_clean`), `fixed`, `remaining`.

    Raises:
        RetinarayError: See `run_doctor`.
    """
    from retinaray.assembly.doctor import run_doctor
    from retinaray.config.inference_schema import DoctorJob

    base = {"annotations": os.fspath(annotations)}
    return run_doctor(make_job(DoctorJob, settings, config=config, base=base))


def report(
    runs: Location | Sequence[Location], *, config: Config = None, **settings: Any
) -> ReportOutcome:
    """Write one HTML page about runs, alone or compared, as `retinaray report`.

    Args:
        runs: Folders that `train`, `tune` or `infer` left, or JSON files; one or several.
        config: Settings to start from.
        settings: Other settings of the command: `output="report.html"`, `detect=True`.

    Returns:
        `report` (the page), `runs` by kind, `num_pictures`, `left_out`.

    Raises:
        RetinarayError: See `run_report`.
    """
    from retinaray.assembly.report import run_report
    from retinaray.config.report_schema import ReportJob

    return run_report(make_job(ReportJob, settings, config=config, base={"runs": _list(runs)}))


def run(verb: str, config: Config = None, **settings: Any) -> Outcome:
    """Run any command by its name.

    Args:
        verb: As in `retinaray VERB`: `convert`, `bundle`, `plan`, `import-odtk`, ...
        config: Settings to start from.
        settings: Settings of the command.

    Returns:
        What the command prints, by `to_text()` and `to_json()`; `exit_code` is 1 if it found
        faults.

    Raises:
        ValueError: If there is no such command.
        RetinarayError: See the command's runner.
    """
    from retinaray.cli import VERBS

    if verb not in VERBS:
        raise ValueError(f"verb={verb!r}: expected one of {', '.join(VERBS)}")
    job = make_job(_find(VERBS[verb].job), settings, config=config)
    outcome: Outcome = _find(VERBS[verb].runner)(job)
    return outcome


def _find(place: str) -> Any:
    module, _, name = place.partition(":")
    return vars(importlib.import_module(module))[name]


def _as_loaded(model: Model | Location) -> dict[str, object]:
    """A model as settings: its file, and what it was loaded with."""
    if isinstance(model, str | os.PathLike):
        return {"model": os.fspath(model)}
    return {"model": model.uri, **model.settings}


def _as_file(model: Model | Location) -> dict[str, object]:
    """A model as settings: its file, and how it is reached; how it was run is left out."""
    loaded = _as_loaded(model)
    return {key: loaded[key] for key in ("model", _ENDPOINT) if key in loaded}


def _list(locations: Location | Sequence[Location]) -> list[str]:
    if isinstance(locations, str | os.PathLike):
        return [os.fspath(locations)]
    return [os.fspath(location) for location in locations]
