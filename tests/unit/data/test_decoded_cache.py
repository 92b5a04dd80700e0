"""With a cache of pixels the batches are those without it, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from retinaray.data import decoded_cache
from retinaray.data.augmentation import AugmentSettings
from retinaray.data.batching import Batch, TrainingDataset, collate_samples
from retinaray.data.cache_folder import CacheFolder
from retinaray.data.coco import CocoDataset, load_coco
from retinaray.data.decoded_cache import DecodedCache
from retinaray.data.image_decoding import decode_image, read_image_size
from retinaray.data.read_cache import CheckedCache, ReadCache, VersionedBytes
from retinaray.data.stream_sampler import StreamSampler
from retinaray.errors import DatasetError, ImageError

# EXIF-rotated, gray, CMYK, 16 bit of TIFF and PNG, palette, alpha, progressive, several frames; of
# large ones JPEGs too that zooms ask for at a half and a quarter.
ODD_FILES = (
    *("hopper_gray.jpg", "hopper_orientation_6.jpg", "hopper_orientation_6.webp", "i_trns.png"),
    *("tiff_16bit_RGB.tiff", "uncompressed_la.png", "chi.gif", "test-card-lossy-tiled.jp2"),
    *("Portrait_6.jpg", "photo_cmyk.jpg", "photo_progressive.jpg", "one_pixel.png"),
    *("hopper.avif", "sugarshack.mpo", "mode_16bit.png", "hopper.bmp", "photo_gray16.png"),
)
EVERYTHING = AugmentSettings(
    flip=0.5,
    vertical_flip=0.5,
    scale_range=(0.5, 2.0),
    crop=0.5,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    hue=0.02,
    mosaic=0.2,
)


class FileReader:
    """Reads local files; a file's version is its digest. Counts; safe to send to processes."""

    def __init__(self) -> None:
        self.num_read = 0

    def __call__(self, uri: str, known: str | None = None) -> VersionedBytes | None:
        content = Path(uri).read_bytes()
        version = sha256(content).hexdigest()
        if version == known:
            return None
        self.num_read += 1
        return VersionedBytes(content, version)

    def read(self, uri: str) -> bytes:
        return Path(uri).read_bytes()


@pytest.fixture
def decoder(tmp_path: Path) -> DecodedCache:
    return make_decoder(tmp_path / "cache", FileReader())


def make_decoder(folder: Path, read: FileReader, *, max_pixels: int = 10**8) -> DecodedCache:
    cache = CheckedCache(CacheFolder(folder, max_bytes=10**9), read)
    return DecodedCache(cache, max_pixels=max_pixels, allow_truncated=False)


@pytest.fixture(scope="session")
def odd_set(odd_folder: Path) -> CocoDataset:
    """The odd files with a box each."""
    images, annotations = [], []
    for number, name in enumerate(ODD_FILES):
        height, width = read_image_size((odd_folder / name).read_bytes())
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        box = [0, 0, width, height]
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": box})
    document = {"images": images, "annotations": annotations}
    categories = [{"id": 1, "name": "thing"}]
    return load_coco(json.dumps(document | {"categories": categories}).encode())


@pytest.fixture
def read_batches(odd_set: CocoDataset, odd_folder: Path) -> Callable[..., list[Batch]]:
    """Two epochs of the odd files: read_batches(num_processes=0, read=..., decoded=...)."""

    def read(*, num_processes: int = 0, **options: Any) -> list[Batch]:
        dataset: Any = TrainingDataset(
            dataset=odd_set,
            images_root=str(odd_folder),
            canvas=(96, 128),
            augment=EVERYTHING,
            seed=5,
            max_pixels=10**8,
            allow_truncated=False,
            **{"read": FileReader().read, **options},
        )
        sampler = StreamSampler(num_images=len(odd_set), batch=9, seed=5, last_step=4)
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate_samples,
            num_workers=num_processes,
        )
        return list(loader)

    return read


def assert_same_batches(one: list[Batch], other: list[Batch]) -> None:
    for left, right in zip(one, other, strict=True):
        assert left.image_ids == right.image_ids
        for field in fields(Batch):
            if field.name not in ("image_ids", "cost"):
                assert getattr(left, field.name).equal(getattr(right, field.name)), field.name


def test_training_gets_the_same_batches_with_each_cache(
    read_batches: Callable[..., list[Batch]], tmp_path: Path, odd_folder: Path
) -> None:
    plain = read_batches()
    for name in ("first", "again"):
        decoded = make_decoder(tmp_path / "pixels", reader := FileReader())
        assert_same_batches(read_batches(decoded=decoded), plain)
        # Some are asked for at two scales; what the second pass asks for is all kept.
        assert (reader.num_read > len(ODD_FILES)) == (name == "first")
    assert reader.num_read == 0
    copies = CheckedCache(CacheFolder(tmp_path / "files", max_bytes=10**9), FileReader())
    for uri in odd_folder.iterdir():
        ReadCache(copies)(str(uri))
    assert_same_batches(read_batches(read=ReadCache(copies)), plain)


def test_loader_processes_share_a_cache_of_pixels(
    read_batches: Callable[..., list[Batch]], tmp_path: Path
) -> None:
    decoded = make_decoder(tmp_path / "pixels", FileReader())
    shared = read_batches(num_processes=2, decoded=decoded)
    assert_same_batches(shared, read_batches())
    assert [batch.cost.num_processes for batch in shared] == [2] * 4
    # What the processes have kept serves this one.
    reader = FileReader()
    read_batches(decoded=make_decoder(tmp_path / "pixels", reader))
    assert reader.num_read == 0


@pytest.mark.parametrize("fit", [(1800, 1200), (300, 300), (200, 100), (40, 40), (9, 9)])
@pytest.mark.parametrize("name", ["Portrait_6.jpg", "photo_cmyk.jpg", "photo_gray16.png"])
def test_decode_gives_the_pixels_of_each_scale(
    decoder: DecodedCache, odd_folder: Path, name: str, fit: tuple[int, int]
) -> None:
    uri = str(odd_folder / name)
    data = (odd_folder / name).read_bytes()
    height, width = read_image_size(data)
    sizes = {"height": height, "width": width}
    expected = decode_image(data, fit_height=fit[0], fit_width=fit[1])
    for other_fit in (fit, (60, 60), fit, fit):
        decoder.decode(uri, **sizes, fit_height=other_fit[0], fit_width=other_fit[1])
    found = decoder.decode(uri, **sizes, fit_height=fit[0], fit_width=fit[1])
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    assert (found.full_height, found.full_width) == (height, width)
    assert found.pixels.flags.writeable
    assert found.pixels.flags.c_contiguous


@pytest.fixture
def png(tmp_path: Path, odd_encode: Callable[..., bytes]) -> Path:
    """A file of 4x6 red pixels."""
    path = tmp_path / "a.png"
    path.write_bytes(odd_encode(np.full((4, 6, 3), (255, 0, 0), np.uint8), "PNG"))
    return path


def red_of(decoder: DecodedCache, path: Path) -> list[int]:
    image = decoder.decode(str(path), height=4, width=6, fit_height=1, fit_width=1)
    return sorted(set(image.pixels[..., 0].ravel().tolist()))


def test_decode_gives_the_new_pixels_when_the_file_has_changed(
    decoder: DecodedCache, png: Path, odd_encode: Callable[..., bytes]
) -> None:
    assert [red_of(decoder, png) for _ in range(2)] == [[255], [255]]
    png.write_bytes(odd_encode(np.full((4, 6, 3), (7, 0, 0), np.uint8), "PNG"))
    assert [red_of(decoder, png) for _ in range(2)] == [[7], [7]]


def test_decode_gives_pixels_of_their_own_each_time(decoder: DecodedCache, png: Path) -> None:
    red_of(decoder, png)
    image = decoder.decode(str(png), height=4, width=6, fit_height=1, fit_width=1)
    image.pixels[:] = 9
    assert red_of(decoder, png) == [255]


def test_decode_keeps_nothing_of_a_file_with_another_size(tmp_path: Path, png: Path) -> None:
    reader = FileReader()
    decoder = make_decoder(tmp_path / "cache", reader)
    for _ in range(2):
        image = decoder.decode(str(png), height=6, width=4, fit_height=1, fit_width=1)
        assert (image.full_height, image.full_width) == (4, 6)
    assert reader.num_read == 2


def test_decode_refuses_what_is_above_a_lowered_limit(tmp_path: Path, png: Path) -> None:
    red_of(make_decoder(tmp_path / "cache", FileReader()), png)
    # 4 x 6 = 24 pixels.
    assert red_of(make_decoder(tmp_path / "cache", FileReader(), max_pixels=24), png) == [255]
    with pytest.raises(ImageError, match=r"6x4 pixels is above the limit max_pixels=23"):
        red_of(make_decoder(tmp_path / "cache", FileReader(), max_pixels=23), png)


def test_decode_decodes_anew_when_the_decoder_has_changed(
    tmp_path: Path, png: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    red_of(make_decoder(tmp_path / "cache", FileReader()), png)
    monkeypatch.setattr(decoded_cache.PIL, "__version__", "99.0")
    reader = FileReader()
    assert red_of(make_decoder(tmp_path / "cache", reader), png) == [255]
    assert reader.num_read == 1


def test_dataset_names_file_and_id_when_a_cached_decode_fails(
    tmp_path: Path, read_batches: Callable[..., list[Batch]]
) -> None:
    cache = CheckedCache(
        CacheFolder(tmp_path, max_bytes=10**6), lambda _, __: VersionedBytes(b"no image", "1")
    )
    decoded = DecodedCache(cache, max_pixels=10**8, allow_truncated=False)
    with pytest.raises(DatasetError, match=r"image \d+ \(.*\): expected JPEG, PNG.*b'no image'"):
        read_batches(decoded=decoded)
