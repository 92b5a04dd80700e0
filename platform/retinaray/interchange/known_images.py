"""Names and sizes of images, for label formats that do not tell them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from retinaray.data.image_files import FileState, read_headers
from retinaray.errors import DatasetError
from retinaray.interchange.labelled_set import LabelledImage
from retinaray.local_listing import walk_names

IMAGE_ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""What counts as an image in a folder."""


@dataclass(frozen=True)
class KnownImages:
    """Images without their boxes.

    Attributes:
        images: By name.
        source: What messages call them.
    """

    images: tuple[LabelledImage, ...]
    source: str

    def by_stem(self) -> dict[str, LabelledImage]:
        """The images by their names without ending, subfolders included.

        Raises:
            DatasetError: If two differ in nothing but their ending.
        """
        found: dict[str, LabelledImage] = {}
        for image in self.images:
            stem = str(PurePosixPath(image.file_name).with_suffix(""))
            if stem in found:
                raise DatasetError(
                    f"{self.source}: {found[stem].file_name!r} and {image.file_name!r} share one "
                    "label file; rename one of them"
                )
            found[stem] = image
        return found


def find_images(folder: Path, *, num_threads: int = 8) -> KnownImages:
    """All images below a folder, with the sizes that their headers tell.

    Raises:
        DatasetError: If the folder cannot be read, holds none, or one of them is broken.
    """
    try:
        names = [name for name in walk_names(folder) if _ending(name) in IMAGE_ENDINGS]
    except OSError as error:
        raise DatasetError(
            f"{folder}: expected a folder of images (--images), cannot read it: {error.strerror}"
        ) from error
    if not names:
        raise DatasetError(f"{folder}: expected images (--images), found none")
    headers = read_headers(
        [{"file_name": name} for name in names], str(folder), num_threads=num_threads
    )
    for name, header in zip(names, headers, strict=True):
        if header.state is not FileState.READ:
            raise DatasetError(
                f"{folder}/{name}: expected an image, cannot read its size "
                f"({header.problem or header.state.value}); repair it or take it away"
            )
    return KnownImages(
        tuple(
            LabelledImage(name, header.height, header.width)
            for name, header in zip(names, headers, strict=True)
        ),
        str(folder),
    )


def without_boxes(images: Iterable[LabelledImage], source: str) -> KnownImages:
    """The images of a data set that was read, as known ones."""
    return KnownImages(
        tuple(LabelledImage(image.file_name, image.height, image.width) for image in images), source
    )


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()
