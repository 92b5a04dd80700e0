"""One pass over images that keeps what the network proposes, for the choice of thresholds later."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace

from retinaray.evaluation.candidates import DEFAULT_FLOOR, CandidateSet, join_detections
from retinaray.inference.pipeline import ImageResult, ImageSource, ReadSettings, detect_placed
from retinaray.inference.predictor import Predictor, PredictorSettings

# More than any network gives: TensorRT's top-k ends at 3840.
MAX_CANDIDATES = 3839


def make_candidate_settings(
    settings: PredictorSettings, *, floor: float = DEFAULT_FLOOR
) -> PredictorSettings:
    """The same runtime, without suppression and down to a low score.

    Args:
        settings: Batch, threads and canvas are taken from here.
        floor: Candidates must score above this.
    """
    return replace(settings, score_threshold=floor, nms_kind="none", max_detections=MAX_CANDIDATES)


def collect_candidates(
    predictor: Predictor,
    sources: Iterable[ImageSource],
    *,
    read: Callable[[str], bytes],
    batch: int,
    settings: ReadSettings,
    floor: float = DEFAULT_FLOOR,
) -> tuple[CandidateSet, list[ImageResult]]:
    """Run a network once over images.

    Args:
        predictor: Loaded with `make_candidate_settings`, with the same floor.
        sources: The images.
        read: Gives the bytes at a URI; raises StorageError.
        batch: Images per network call.
        settings: Reading.
        floor: What the predictor was loaded with.

    Returns:
        Candidates of the images that could be read, in the order of the sources; and the errors of
        the others.

    Raises:
        ValueError: If an image id occurs twice.
    """
    failed: list[ImageResult] = []
    found = []
    placed = detect_placed(predictor, sources, read=read, batch=batch, settings=settings)
    with closing(placed):
        for item in placed:
            if isinstance(item, ImageResult):
                failed.append(item)
            else:
                found.append((item.source.image_id, item.placement, item.detections))
    return join_detections(found, floor=floor), failed
