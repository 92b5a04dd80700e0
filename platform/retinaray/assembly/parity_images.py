"""The images of a parity run: read batch by batch, and drawn where two runtimes differ most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from retinaray.artifact import ModelCard
from retinaray.data.transforms import Placement
from retinaray.errors import ImageError, StorageError
from retinaray.export.parity_gate import WorstImage
from retinaray.inference.pipeline import ImageSource, ReadSettings, load_canvas
from retinaray.reporting.parity_page import ParityPicture
from retinaray.reporting.parity_pictures import draw_differences

ImageKey = tuple[ImageSource, Placement]
"""Which image, and where it lies on the canvas."""

_Loaded = tuple[UInt8[np.ndarray, "H W 3"], Placement]


def read_batches(
    sources: Iterator[ImageSource],
    canvas: tuple[int, int],
    read: Callable[[str], bytes],
    *,
    batch: int,
    settings: ReadSettings,
    failed: list[str],
) -> Iterator[tuple[Tensor, list[ImageKey]]]:
    """Canvases of one batch after the other, and of none while the caller works on one.

    Nothing is read ahead: threads that decode would be measured with the networks.

    Args:
        sources: Images.
        canvas: Height and width.
        read: Gives the bytes at a URI.
        batch: Images at once.
        settings: Reading.
        failed: Gets a line per image that cannot be read.

    Yields:
        Canvases [N, 3, H, W], N from 1 to the batch, and the source and place of each.
    """

    def load(source: ImageSource) -> _Loaded | str:
        try:
            return load_canvas(source, canvas, read, settings)
        except (ImageError, StorageError) as error:
            return f"{source.uri}: {error}"

    with ThreadPoolExecutor(settings.threads, thread_name_prefix="decode") as pool:
        while chunk := list(islice(sources, batch)):
            images: list[np.ndarray] = []
            keys: list[ImageKey] = []
            for source, loaded in zip(chunk, pool.map(load, chunk), strict=True):
                if isinstance(loaded, str):
                    failed.append(loaded)
                else:
                    images.append(loaded[0])
                    keys.append((source, loaded[1]))
            if images:
                yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), keys


def draw_worst(
    case: str,
    worst: WorstImage[ImageKey],
    card: ModelCard,
    canvas: tuple[int, int],
    read: Callable[[str], bytes],
    settings: ReadSettings,
) -> ParityPicture:
    """Read an image once more and draw both sets of boxes on it.

    Args:
        case: Name of the case.
        worst: The image, and what was found in it.
        card: The model, for names and thresholds.
        canvas: Height and width that it was compared on.
        read: Gives the bytes at a URI.
        settings: Reading.

    Raises:
        ImageError, StorageError: If the image cannot be read any more.
    """
    source, placement = worst.key
    pixels, _ = load_canvas(source, canvas, read, settings)
    content = pixels[: placement.content_height, : placement.content_width]
    return ParityPicture(
        case=case,
        image=PurePosixPath(source.uri).name,
        summary=_summarize(worst),
        jpeg=draw_differences(
            np.ascontiguousarray(content),
            worst.reference,
            worst.candidate,
            worst.differences,
            names=card.categories.names,
            score_thresholds=card.score_thresholds,
        ),
    )


def _summarize(worst: WorstImage[ImageKey]) -> str:
    found = worst.differences
    counts = {
        "missing": len(found.missing),
        "extra": len(found.extra),
        "of another class": len(found.flips),
    }
    changes = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    text = f"of {found.num_reference} detections {changes or 'none changed'}"
    if len(found.pairs):
        text += f"; pairs differ by up to {found.box_px.max():.2g} px and "
        text += f"{found.scores.max():.2g} of score"
    return text
