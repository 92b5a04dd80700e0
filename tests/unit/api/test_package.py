"""`import retinaray` is cheap, and everything that it promises is there."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import retinaray


def test_import_brings_neither_torch_nor_ray() -> None:
    code = (
        "import sys, json, retinaray; "
        "print(json.dumps([sorted(m.partition('.')[0] for m in sys.modules), dir(retinaray)]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(Path(retinaray.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    modules, names = json.loads(answer.stdout)
    assert not {"torch", "ray", "numpy", "pydantic", "PIL", "yaml"} & set(modules)
    # Offered for completion before they are imported.
    assert {"load", "train", "Model", "errors", "__version__"} <= set(names)


@pytest.mark.parametrize("name", [name for name in retinaray.__all__ if name != "__version__"])
def test_every_export_is_there_and_documented(name: str) -> None:
    value = getattr(retinaray, name)
    assert value.__doc__
    assert value.__name__ in (name, f"retinaray.{name}")


def test_exports_are_those_that_mypy_sees() -> None:
    places = {name for name in retinaray.__all__ if name not in ("__version__", "errors")}
    assert set(retinaray._PLACES) == places
    assert all(place.endswith(f":{name}") for name, place in retinaray._PLACES.items())
    source = Path(retinaray.__file__).read_text("utf-8")
    typed = source.partition("if TYPE_CHECKING:")[2].partition("__version__")[0]
    assert all(f" {name}," in typed or f" {name}\n" in typed for name in places)


def test_no_export_has_the_name_of_a_module() -> None:
    # Importing the module `retinaray.export` would put it in the place of a function `export`.
    modules = {module.name for module in pkgutil.iter_modules(retinaray.__path__)}
    assert "export" in modules
    assert modules & set(retinaray.__all__) == {"errors"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'retinaray' has no attribute 'lod'"):
        _ = retinaray.lod  # type: ignore[attr-defined]
    assert not hasattr(retinaray, "export_onnx")
