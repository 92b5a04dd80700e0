"""Which library decodes a JPEG soonest, and which resizes the pixels soonest at equal quality.

    PYTHONPATH=platform python tests/benchmarks/decode.py [--quick]

The competitors take turns. Each library works single-threaded; "2t" means two Python threads that
share the files. Beside the wall clock, processor time is compared with Pillow's: busy neighbours
disturb it little.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from run import Record, make_records, round_to_figures, skip, summarise, time_rounds

from retinaray.data.image_decoding import decode_image, read_image_size

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
FIT_PX = 512
LARGE_FILE_BYTES = 2_000_000  # in aerial_cars: the drone photos of 4000x2250
MODULES = {"torchvision": "torchvision", "opencv": "cv2", "simplejpeg": "simplejpeg"}

Decode = Callable[[bytes], np.ndarray]
Resize = Callable[[np.ndarray], np.ndarray]


def run(quick: bool = False) -> list[Record]:
    """Measure all cases; a data set or library that is absent gives a record with the reason."""
    absent = [name for name, module in MODULES.items() if importlib.util.find_spec(module) is None]
    records = [skip(f"decode/{name}", f"{name} is not installed") for name in absent]
    if not DATA.is_dir():
        return [*records, skip("decode", f"needs the real data sets in {DATA}, which is absent")]
    with single_threaded_libraries():
        for name, files in load_files(quick).items():
            config = {"data": name, "num_images": len(files), "rounds": 2 if quick else 9}
            for task, decoders in (
                ("full", full_decoders(absent)),
                ("fit512", fit_decoders(absent)),
            ):
                checked = check_decoders(task, decoders, files[0])
                for num_threads in (1, 2):
                    case = f"decode/{task}/{name}/{num_threads}t"
                    records += measure(case, decoders, files, num_threads, checked, config)
            records += measure_resizing(name, files, make_resizers(absent), config)
            records += scaling_error(name, files, config)
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
    competitors: dict[str, Decode] | dict[str, Resize],
    inputs: list[Any],
    num_threads: int,
    checked: str,
    config: dict[str, Any],
) -> list[Record]:
    """Time every competitor over all inputs; milliseconds per image."""
    with ThreadPoolExecutor(num_threads) as pool:
        rounds = time_rounds(
            {
                name: lambda compete=compete: len(list(pool.map(compete, inputs)))
                for name, compete in competitors.items()
            },
            num_rounds=config["rounds"],
        )
    assert set(rounds.outputs.values()) == {len(inputs)}
    records = make_records(
        case,
        rounds,
        unit="ms/image",
        convert=lambda seconds: 1000 * seconds / len(inputs),
        baselines={name: ["pillow"] for name in competitors},
        checked=checked,
        config=config | {"num_threads": num_threads},
    )
    for record, cpu_s in zip(records, rounds.cpu_s.values(), strict=True):
        ratios = [pillow / own for pillow, own in zip(rounds.cpu_s["pillow"], cpu_s, strict=True)]
        record["cpu_ms_per_image"] = round_to_figures(1000 * median(cpu_s) / len(inputs))
        record["pillow_cpu_over_own"] = round_to_figures(median(ratios), 3)
    return records


def check_decoders(task: str, decoders: dict[str, Decode], data: bytes) -> str:
    """Compare all outputs with Pillow's and say what was found."""
    expected = decoders["pillow"](data).astype(int)
    limit = 0 if task == "full" else 5
    for name, decode in decoders.items():
        pixels = decode(data)
        assert pixels.shape == expected.shape, (task, name, pixels.shape, expected.shape)
        assert np.abs(pixels - expected).mean() <= limit, (task, name)
    return f"equal sizes, mean difference from Pillow at most {limit} gray levels"


def measure_resizing(
    name: str, files: list[bytes], resizers: dict[str, Resize], config: dict[str, Any]
) -> list[Record]:
    """Time the resizers, and say how far their pixels are from exact ones and from Pillow's."""
    arrays = [decode_pillow(data) for data in files]
    errors = {
        method: resize_error(resize, resizers["pillow"], arrays[:4])
        for method, resize in resizers.items()
    }
    assert errors["torch-uint8"]["max_abs_error"] <= 2, errors
    checked = "torch-uint8 is within 2 gray levels of exact antialiased bilinear"
    records = measure(f"resize/fit512/{name}", resizers, arrays, 1, checked, config)
    return [record | errors[record["case"].rsplit("/", 1)[1]] for record in records]


def resize_error(resize: Resize, pillow: Resize, arrays: list[np.ndarray]) -> dict[str, float]:
    """Distances in gray levels: from antialiased bilinear in float64, not rounded; from Pillow."""
    outputs = [resize(pixels).astype(np.float64) for pixels in arrays]
    exact = [
        np.abs(output - resize_torch(pixels, torch.float64))
        for output, pixels in zip(outputs, arrays, strict=True)
    ]
    other = [
        np.abs(output - pillow(pixels)) for output, pixels in zip(outputs, arrays, strict=True)
    ]
    return {
        "mean_abs_error": round(float(np.mean([difference.mean() for difference in exact])), 3),
        "max_abs_error": round(float(max(difference.max() for difference in exact)), 2),
        "share_equal_to_pillow": round(float(np.mean([(diff == 0).mean() for diff in other])), 4),
        "max_abs_difference_from_pillow": float(max(difference.max() for difference in other)),
    }


def scaling_error(name: str, files: list[bytes], config: dict[str, Any]) -> list[Record]:
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
    assert max(errors) < 1, errors
    return [
        {
            "case": f"decode/scaling_error/{name}/retinaray",
            "unit": "gray levels, mean absolute",
            **summarise(errors),
            "max_abs_error": largest,
            "checked": "below 1 gray level in every image",
            "config": config,
        }
    ]


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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one image per set, two repeats")
    for record in run(parser.parse_args().quick):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
