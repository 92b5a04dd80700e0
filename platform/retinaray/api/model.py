"""A loaded model that takes images one by one or in lists and answers in their own pixels."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from functools import partial
from typing import Any, Literal

from retinaray import errors
from retinaray.api.detections import (
    ImageDetections,
    fail_detections,
    place_detections,
)
from retinaray.api.pictures import Picture, PictureIntake, decode_picture
from retinaray.api.settings import make_job, name_settings
from retinaray.artifact import ModelCard
from retinaray.assembly.reading import (
    absolute_uri,
    make_predictor_settings,
    make_read_settings,
    make_reader,
    read_model_file,
)
from retinaray.config.batch_schema import InferJob
from retinaray.config.options import OptionTable
from retinaray.errors import ConfigError
from retinaray.inference.pipeline import ImageResult, ReadSettings, detect_placed
from retinaray.inference.predictor import Predictor, load_predictor
from retinaray.inference.shared_predictor import share_predictor
from retinaray.machine import count_cores

logger = logging.getLogger(__name__)

_SECTIONS = ("detection", "reading")
_KEYS = ("backend", "batch")


class Model:
    """A model in the runtime that runs it; made by `load`.

    Several threads may call it at once: they read images beside each other and take turns in the
    network.

    Args:
        predictor: The runtime with the model inside.
        uri: Where the model came from, absolute.
        reason: Why this runtime was chosen.
        batch: Images per network call.
        score_threshold: Of all classes; none = the card's, per class.
        settings: What `load` was given, by dotted key.
        read: Gives the bytes at a path or URI.
        read_settings: How images are read.

    Attributes:
        uri: See above.
        backend: `torch`, `openvino`, `onnxruntime` or `tensorrt`.
        reason: See above.
        card: Classes, anchors, thresholds, training settings; everything but the weights.
        canvas: Height and width of the network's input in pixels.
        score_thresholds: Lowest score of each class.
        settings: See above.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        uri: str,
        reason: str,
        batch: int,
        score_threshold: float | None,
        settings: Mapping[str, object],
        read: Callable[[str], bytes],
        read_settings: ReadSettings,
    ) -> None:
        self.uri = uri
        self.backend = predictor.backend
        self.reason = reason
        self.card: ModelCard = predictor.card
        self.canvas = predictor.canvas
        self.score_thresholds = self.card.score_thresholds
        if score_threshold is not None:
            self.score_thresholds = (score_threshold,) * len(self.card.categories)
        self.settings = dict(settings)
        self._predictor = share_predictor(predictor)
        self._batch = batch
        self._read = read
        self._read_settings = read_settings

    def __repr__(self) -> str:
        height, width = self.canvas
        return (
            f"Model({self.uri}: {len(self.names)} classes, {height}x{width} (height x width), "
            f"{self.backend})"
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Class names by class index."""
        return self.card.categories.names

    def predict(
        self,
        images: Picture | Iterable[Picture],
        *,
        score_threshold: float | None = None,
        on_error: Literal["raise", "keep"] = "raise",
    ) -> list[ImageDetections]:
        """Detect objects, as `evaluate` and `infer` do for files.

        Args:
            images: One image or an iterable of images: paths, URIs (`s3://`, `file://`), bytes of
                files, PIL images, uint8 arrays [height, width, 3] or uint8 tensors
                [3, height, width], RGB, in any mixture.
            score_threshold: Only objects that score above; none = the thresholds of the model. It
                cannot be below these: load the model with a lower one.
            on_error: What an image costs that cannot be read: an exception, or an entry without
                objects whose `error` says why.

        Returns:
            One entry per image, in their order; also for one image. Empty for an empty list.

        Raises:
            ImageError: If an image cannot be decoded; its name is in front of the reason.
            MissingFileError: If there is no file at a path or URI; StorageError for other reasons.
            ConfigError: If the threshold is below that of the model.
            TypeError, ValueError: If one is no image, whatever `on_error` says.
        """
        if on_error not in ("raise", "keep"):
            raise ValueError(f"on_error: expected 'raise' or 'keep', got {on_error!r}")
        self._expect_threshold(score_threshold)
        intake = PictureIntake(images, self._read)
        placed = detect_placed(
            self._predictor,
            intake.sources(),
            read=intake.read,
            batch=self._batch,
            settings=self._read_settings,
        )
        found = []
        with closing(placed):
            for item in placed:
                image, name = intake.take(item.source)
                if isinstance(item, ImageResult):
                    found.append(self._fail(item, name, on_error))
                    continue
                decode = partial(decode_picture, image, name, self._read, self._read_settings)
                found.append(
                    place_detections(
                        item.detections,
                        item.placement,
                        image=name,
                        categories=self.card.categories,
                        score_threshold=score_threshold,
                        decode=decode,
                    )
                )
        return found

    def _expect_threshold(self, score_threshold: float | None) -> None:
        lowest = max(self.score_thresholds)
        if score_threshold is not None and not lowest <= score_threshold < 1:
            raise ConfigError(
                f"score_threshold={score_threshold}: expected a number from {lowest:g}, with which "
                f"{self.uri} was loaded, to below 1; for a lower one load it with "
                "score_threshold=..."
            )

    def _fail(self, result: ImageResult, name: str, on_error: str) -> ImageDetections:
        text = result.error if name in result.error else f"{name}: {result.error}"
        if on_error == "keep":
            return fail_detections(name, self.card.categories, text)
        raise vars(errors)[result.exception](text)


def load(path: str | os.PathLike[str], **settings: Any) -> Model:
    """Load a model: `.pth` weights, an exported `.onnx` file, or a TensorRT `.plan`.

    Args:
        path: Local path or URI.
        settings: Settings of `retinaray infer` that say how a model is run and images are read, by
            flag or by path: `backend`, `batch`, `size`, `precision`, `score_threshold`, `nms_iou`,
            `nms`, `max_detections`, `endpoint_url`, `read_threads`, `max_pixels`, and the other
            settings of its sections `detection` and `reading`. The defaults are those of the
            command.

    Raises:
        ConfigError: If a setting is wrong, or none of these; all faults at once.
        StorageError: If the file cannot be read.
        CheckpointError: If it is damaged, or none of ours.
        InferenceError: If the runtime cannot run here, or not with these settings.
    """
    table = OptionTable(InferJob)
    named, _ = name_settings(settings, table)
    foreign = [key for key in named if table.has(key) and not _is_of_model(key)]
    if foreign:
        raise ConfigError(
            f"{', '.join(foreign)}: a setting of a run over many images, not of a model; leave it "
            "out, or give it to retinaray.infer"
        )
    # A model needs no images: the folder stands in for those that come later.
    base = {"model": os.fspath(path), "images": "."}
    job = make_job(InferJob, settings, base=base)
    read = make_reader(job.reading)
    content, sidecar = read_model_file(job.model, read)
    predictor, reason = load_predictor(
        content,
        uri=job.model,
        backend=job.backend,
        settings=make_predictor_settings(job.detection, batch=job.batch, threads=count_cores()),
        sidecar=sidecar,
    )
    logger.info("backend %s: %s", predictor.backend, reason)
    return Model(
        predictor,
        uri=absolute_uri(job.model),
        reason=reason,
        batch=job.batch,
        score_threshold=job.detection.score_threshold,
        settings=named,
        read=read,
        read_settings=make_read_settings(job.reading),
    )


def _is_of_model(key: str) -> bool:
    return key in _KEYS or key.partition(".")[0] in _SECTIONS
