"""retinaray: RetinaNet detectors trained, tuned and served on Ray.

`import retinaray` is cheap: torch and ray are imported by the functions that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from retinaray import errors

if TYPE_CHECKING:
    from retinaray.api.commands import (
        anchor_coverage,
        check_dataset,
        choose_thresholds,
        compare_runtimes,
        evaluate,
        export_model,
        infer,
        report,
        run,
        train,
        tune,
    )
    from retinaray.api.dataset import draw_truth, read_dataset
    from retinaray.api.detections import DetectedObject, ImageDetections
    from retinaray.api.model import Model, load
    from retinaray.distributed.resources import connect

__version__ = "0.1.0"

__all__ = [
    "DetectedObject",
    "ImageDetections",
    "Model",
    "__version__",
    "anchor_coverage",
    "check_dataset",
    "choose_thresholds",
    "compare_runtimes",
    "connect",
    "draw_truth",
    "errors",
    "evaluate",
    "export_model",
    "infer",
    "load",
    "read_dataset",
    "report",
    "run",
    "train",
    "tune",
]

_PLACES = {
    "DetectedObject": "retinaray.api.detections:DetectedObject",
    "ImageDetections": "retinaray.api.detections:ImageDetections",
    "Model": "retinaray.api.model:Model",
    "anchor_coverage": "retinaray.api.commands:anchor_coverage",
    "check_dataset": "retinaray.api.commands:check_dataset",
    "choose_thresholds": "retinaray.api.commands:choose_thresholds",
    "compare_runtimes": "retinaray.api.commands:compare_runtimes",
    "connect": "retinaray.distributed.resources:connect",
    "draw_truth": "retinaray.api.dataset:draw_truth",
    "evaluate": "retinaray.api.commands:evaluate",
    "export_model": "retinaray.api.commands:export_model",
    "infer": "retinaray.api.commands:infer",
    "load": "retinaray.api.model:load",
    "read_dataset": "retinaray.api.dataset:read_dataset",
    "report": "retinaray.api.commands:report",
    "run": "retinaray.api.commands:run",
    "train": "retinaray.api.commands:train",
    "tune": "retinaray.api.commands:tune",
}

if not TYPE_CHECKING:
    # For mypy a module with this function would have every attribute.
    def __getattr__(name: str) -> object:
        """Import what is exported when it is first asked for."""
        place = _PLACES.get(name)
        if place is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        module, _, attribute = place.partition(":")
        value = vars(importlib.import_module(module))[attribute]
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Names for completion; those that are not imported yet, too."""
    return sorted({*globals(), *__all__})
