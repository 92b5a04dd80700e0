"""Which library decodes a JPEG soonest, and which resizes the pixels soonest at equal quality.

    PYTHONPATH=platform python tests/benchmarks/decode.py [--quick]

One JSON line per figure. Repeats of all competitors are interleaved, in random order, so that a
busy machine slows them alike; the first repeat is dropped. Each library works single-threaded; "2t"
means two Python threads that share the files.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import json
import random
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from retinaray.data.image_decoding import decode_image, read_image_size

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
FIT_PX = 512
LARGE_FILE_BYTES = 2_000_000  # in aerial_cars: the drone photos of 4000x2250
DISTRIBUTIONS = {
    "pillow": "pillow",
    "torchvision": "torchvision",
    "opencv": "opencv-python-headless",
    "simplejpeg": "simplejpeg",
    "retinaray": "retinaray",
}
MODULES = {"torchvision": "torchvision", "opencv": "cv2", "simplejpeg": "simplejpeg"}

Record = dict[str, object]
Decode = Callable[[bytes], np.ndarray]
Resize = Callable[[np.ndarray], np.ndarray]


def run(quick: bool = False) -> list[Record]:
    """Measure all cases; a data set or library that is absent gives a record with the reason."""
    absent = [name for name, module in MODULES.items() if importlib.util.find_spec(module) is None]
    records: list[Record] = [skip(f"decode/{name}", f"{name} is not installed") for name in absent]
    if not DATA.is_dir():
        return [*records, skip("decode", f"needs the real data sets in {DATA}, which is absent")]
    repeats = 2 if quick else 9
    with single_threaded_libraries():
        for name, files in load_files(quick).items():
            for task, decoders in (
                ("full", full_decoders(absent)),
                ("fit512", fit_decoders(absent)),
            ):
                check_decoders(task, decoders, files[0])
                for num_threads in (1, 2):
                    case = f"decode/{task}/{name}/{num_threads}t"
                    records += measure(case, decoders, files, num_threads, repeats)
            pixels = [decode_pillow(data) for data in files]
            resizers = make_resizers(absent)
            for record in measure(f"resize/fit512/{name}", resizers, pixels, 1, repeats):
                method = str(record["case"]).rsplit("/", 1)[1]
                records.append(record | resize_error(resizers[method], resizers["pillow"], pixels))
            records += scaling_error(name, files)
    return records


def load_files(quick: bool) -> dict[str, list[bytes]]:
    """JPEG bytes per data set, spread over its sorted names; the large photos apart."""
    counts = {"bccd": 32, "coco128": 32, "aerial_cars": 16, "aerial_cars_4000x2250": 4}
    chosen: dict[str, list[bytes]] = {}
    for name, count in counts.items():
        folder = name.removesuffix("_4000x2250")
        file_names = {
            entry["file_name"]
            for split in ("train", "test")
            for entry in json.loads((DATA / folder / f"{split}.json").read_text())["images"]
        }
        paths = [DATA / folder / "images" / file_name for file_name in sorted(file_names)]
        is_large = name != folder
        paths = [path for path in paths if (path.stat().st_size > LARGE_FILE_BYTES) == is_large]
        step = max(1, len(paths) // (1 if quick else count))
        chosen[name] = [path.read_bytes() for path in paths[::step]][: 1 if quick else count]
    return chosen


# --- decoders -------------------------------------------------------------------------------------


def decode_pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def decode_torchvision(data: bytes) -> np.ndarray:
    from torchvision.io import ImageReadMode, decode_jpeg

    tensor = decode_jpeg(
        torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB
    )
    return np.ascontiguousarray(tensor.permute(1, 2, 0).numpy())


def decode_opencv(data: bytes, divisor: int = 1) -> np.ndarray:
    import cv2

    reduced = {
        1: cv2.IMREAD_COLOR,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }
    flags = reduced[divisor] | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), flags), cv2.COLOR_BGR2RGB)


def decode_simplejpeg(data: bytes, divisor: int = 1) -> np.ndarray:
    import simplejpeg

    height, width = read_image_size(data)
    return simplejpeg.decode_jpeg(
        data, "RGB", min_height=-(-height // divisor), min_width=-(-width // divisor)
    )


def divisor_for_fit(data: bytes) -> int:
    longer_side = max(read_image_size(data))
    return next((divisor for divisor in (8, 4, 2) if longer_side >= 2 * FIT_PX * divisor), 1)


def decode_pillow_draft(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    divisor = divisor_for_fit(data)
    image.draft("RGB", (image.width // divisor, image.height // divisor))
    return image.convert("RGB")


def full_decoders(absent: list[str]) -> dict[str, Decode]:
    decoders: dict[str, Decode] = {
        "pillow": decode_pillow,
        "torchvision": decode_torchvision,
        "opencv": decode_opencv,
        "simplejpeg": decode_simplejpeg,
        "retinaray": lambda data: decode_image(data).pixels,
    }
    return {name: decode for name, decode in decoders.items() if name not in absent}


def fit_decoders(absent: list[str]) -> dict[str, Decode]:
    decoders: dict[str, Decode] = {
        "pillow": lambda data: resize_pillow(Image.open(io.BytesIO(data)).convert("RGB")),
        "pillow+torch": lambda data: resize_torch(decode_pillow(data)),
        "pillow-draft": lambda data: resize_pillow(decode_pillow_draft(data)),
        "pillow-draft+torch": lambda data: resize_torch(np.array(decode_pillow_draft(data))),
        "torchvision+torch": lambda data: resize_torch(decode_torchvision(data)),
        "opencv+torch": lambda data: resize_torch(decode_opencv(data)),
        "opencv": lambda data: resize_opencv_area(decode_opencv(data)),
        "opencv-reduced+torch": lambda data: resize_torch(
            decode_opencv(data, divisor_for_fit(data))
        ),
        "simplejpeg+torch": lambda data: resize_torch(decode_simplejpeg(data)),
        "simplejpeg-scaled+torch": lambda data: resize_torch(
            decode_simplejpeg(data, divisor_for_fit(data))
        ),
        "retinaray+torch": lambda data: resize_torch(
            decode_image(data, fit_height=FIT_PX, fit_width=FIT_PX).pixels
        ),
    }
    return {name: decode for name, decode in decoders.items() if not name.startswith(tuple(absent))}


# --- resizing -------------------------------------------------------------------------------------


def fitted_size(height: int, width: int) -> tuple[int, int]:
    scale = min(FIT_PX / height, FIT_PX / width)
    return max(1, int(height * scale + 1e-6)), max(1, int(width * scale + 1e-6))


def resize_pillow(image: Image.Image, reducing_gap: float | None = None) -> np.ndarray:
    height, width = fitted_size(image.height, image.width)
    return np.array(
        image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=reducing_gap)
    )


def resize_torch(pixels: np.ndarray, dtype: torch.dtype = torch.uint8) -> np.ndarray:
    # An HWC array permuted to CHW is "channels last", for which torch has vectorised uint8 code.
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(dtype)
    resized = torch.nn.functional.interpolate(
        images, fitted_size(*pixels.shape[:2]), mode="bilinear", antialias=True
    )
    return resized[0].permute(1, 2, 0).numpy()


def resize_opencv(pixels: np.ndarray, method: str) -> np.ndarray:
    import cv2

    height, width = fitted_size(*pixels.shape[:2])
    return cv2.resize(pixels, (width, height), interpolation=getattr(cv2, method))


def resize_opencv_area(pixels: np.ndarray) -> np.ndarray:
    return resize_opencv(pixels, "INTER_AREA")


def make_resizers(absent: list[str]) -> dict[str, Resize]:
    resizers: dict[str, Resize] = {
        "pillow": lambda pixels: resize_pillow(Image.fromarray(pixels)),
        "pillow-gap3": lambda pixels: resize_pillow(Image.fromarray(pixels), 3.0),
        "pillow-gap2": lambda pixels: resize_pillow(Image.fromarray(pixels), 2.0),
        "torch-uint8": resize_torch,
        "torch-float32": lambda pixels: (
            resize_torch(pixels, torch.float32).round().clip(0, 255).astype(np.uint8)
        ),
    }
    if "opencv" not in absent:
        resizers["opencv-area"] = resize_opencv_area
        resizers["opencv-linear"] = lambda pixels: resize_opencv(pixels, "INTER_LINEAR")
    return resizers


# --- measuring ------------------------------------------------------------------------------------


def measure(
    case: str,
    competitors: dict[str, Callable[..., np.ndarray]],
    inputs: list[bytes] | list[np.ndarray],
    num_threads: int,
    repeats: int,
) -> list[Record]:
    """Time every competitor over all inputs; milliseconds per image, wall clock."""
    times_ms: dict[str, list[float]] = {name: [] for name in competitors}
    order = random.Random(0)
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(repeats + 1):
            for name in order.sample(sorted(competitors), len(competitors)):
                start = time.perf_counter()
                if num_threads == 1:
                    for item in inputs:
                        competitors[name](item)
                else:
                    list(pool.map(competitors[name], inputs))
                times_ms[name].append(1000 * (time.perf_counter() - start) / len(inputs))
    baseline = np.array(times_ms["pillow"][1:])
    records: list[Record] = []
    for name, values in times_ms.items():
        kept = np.array(values[1:])
        p10, median, p90 = (float(np.round(np.percentile(kept, q), 3)) for q in (10, 50, 90))
        records.append(
            {
                "case": f"{case}/{name}",
                "value": median,
                "unit": "ms/image",
                "n": len(inputs),
                "repeats": repeats,
                "median": median,
                "p10": p10,
                "p90": p90,
                "times_as_fast_as_pillow": round(float(np.median(baseline / kept)), 2),
            }
        )
    return records


def check_decoders(task: str, decoders: dict[str, Decode], data: bytes) -> None:
    """All full decoders give the same pixels, all fitted ones the same size and nearly the same."""
    expected = decoders["pillow"](data).astype(int)
    for name, decode in decoders.items():
        pixels = decode(data)
        assert pixels.shape == expected.shape, (task, name, pixels.shape, expected.shape)
        limit = 0 if task == "full" else 5
        assert np.abs(pixels - expected).mean() <= limit, (task, name)


def resize_error(resize: Resize, resize_pillow: Resize, arrays: list[np.ndarray]) -> Record:
    """Distances in gray levels: from antialiased bilinear in float64, not rounded; from Pillow."""
    exact, pillow = [], []
    for pixels in arrays[:4]:
        resized = resize(pixels).astype(np.float64)
        exact.append(np.abs(resized - resize_torch(pixels, torch.float64)))
        pillow.append(np.abs(resized - resize_pillow(pixels)))
    return {
        "mean_abs_error": round(float(np.mean([difference.mean() for difference in exact])), 3),
        "max_abs_error": round(float(max(difference.max() for difference in exact)), 2),
        "share_equal_to_pillow": round(float(np.mean([(diff == 0).mean() for diff in pillow])), 4),
        "max_abs_difference_from_pillow": int(max(difference.max() for difference in pillow)),
    }


def scaling_error(name: str, files: list[bytes]) -> list[Record]:
    """What scaled decoding changes in the 512-px image, for the files large enough to be scaled."""
    errors, largest = [], 0
    for data in files:
        full = decode_image(data).pixels
        scaled = decode_image(data, fit_height=FIT_PX, fit_width=FIT_PX).pixels
        if scaled.shape != full.shape:
            difference = np.abs(resize_torch(scaled).astype(int) - resize_torch(full))
            errors.append(float(difference.mean()))
            largest = max(largest, int(difference.max()))
    if not errors:
        return []
    p10, median, p90 = (round(float(np.percentile(errors, q)), 3) for q in (10, 50, 90))
    return [
        {
            "case": f"decode/scaling_error/{name}/retinaray",
            "value": round(float(np.mean(errors)), 3),
            "unit": "gray levels, mean absolute",
            "n": len(errors),
            "median": median,
            "p10": p10,
            "p90": p90,
            "max_abs_error": largest,
        }
    ]


def skip(case: str, reason: str) -> Record:
    return {"case": case, "value": None, "unit": "skipped", "n": 0, "reason": reason}


def library_versions() -> dict[str, str]:
    versions = {"torch": torch.__version__}
    for name, distribution in DISTRIBUTIONS.items():
        try:
            versions[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


@contextmanager
def single_threaded_libraries() -> Iterator[None]:
    """One thread inside torch and OpenCV, and no deprecation notes of torchvision.io."""
    cv2 = __import__("cv2") if importlib.util.find_spec("cv2") else None
    torch_threads = torch.get_num_threads()
    opencv_threads = cv2.getNumThreads() if cv2 else 0
    torch.set_num_threads(1)
    if cv2:
        cv2.setNumThreads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        torch.set_num_threads(torch_threads)
        if cv2:
            cv2.setNumThreads(opencv_threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one image per set, two repeats")
    for record in run(parser.parse_args().quick):
        print(json.dumps(record | {"libraries": library_versions()}))


if __name__ == "__main__":
    main()
