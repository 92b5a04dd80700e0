"""The images of a run: where their bytes are, and what came of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from retinaray.errors import ImageError, UnreadableFileError

IMAGE_FAULTS = (ImageError, UnreadableFileError)
"""What becomes the error of one image. A store that fails altogether is no fault of the image: it
ends the part, to be tried again."""

Scalar = str | int | float | bool | None
"""What a pass-through column may hold: whatever JSON writes without brackets."""


@dataclass(frozen=True)
class TarMember:
    """Where an image lies inside a tar.

    Attributes:
        shard: URI of the tar.
        name: The member's name, as it stands there; only a name, never a path.
        offset: Position of its first byte in the tar.
        num_bytes: Its length.
    """

    shard: str
    name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class ImageSource:
    """One image to process: its id in the results, and where its bytes are.

    Attributes:
        image_id: Of any size, or text.
        uri: Its file; of an image in a tar the tar's URI, a slash and the member's name.
        member: Where it lies in its tar; none for a file of its own.
        columns: What a manifest says of it and the results repeat; none without a manifest.
    """

    image_id: int | str
    uri: str
    member: TarMember | None = None
    columns: Mapping[str, Scalar] | None = None


@dataclass(frozen=True)
class ImageResult:
    """What came of one image.

    Attributes:
        source: Which image.
        height: Upright height in pixels; 0 when it failed.
        width: Upright width in pixels; 0 when it failed.
        detections: COCO results of this image: category_id, bbox xywh in original pixels, score;
            best first.
        error: Why there are none; empty when there was no error.
        exception: Class of the error.
    """

    source: ImageSource
    height: int = 0
    width: int = 0
    detections: tuple[dict[str, object], ...] = ()
    error: str = ""
    exception: str = ""

    @property
    def coco_results(self) -> list[dict[str, object]]:
        """The detections as a COCO results list, each with its image_id."""
        return [{"image_id": self.source.image_id, **found} for found in self.detections]


def failed_result(source: ImageSource, error: ImageError | UnreadableFileError) -> ImageResult:
    """The result of an image that cannot be read or decoded."""
    return ImageResult(source=source, error=str(error), exception=type(error).__name__)
