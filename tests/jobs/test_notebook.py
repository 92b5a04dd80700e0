"""The notebook of the documentation, executed from an empty folder as a reader does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
NOTEBOOK = REPOSITORY / "docs" / "notebooks" / "first_model.ipynb"
# A busy machine of two cores takes several times the minute of an idle core.
CELL_TIMEOUT_S = 600


@pytest.fixture
def kernel_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_priority: dict[str, str]
) -> Path:
    """A folder for the kernel with a home of its own, the package on its path, and no Ray."""
    for name in [name for name in os.environ if "RAY_" in name]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    for name, value in {
        "HOME": str(home),
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTER_PLATFORM_DIRS": "1",
        "PYTHONPATH": str(REPOSITORY / "platform"),
        **ray_priority,
    }.items():
        monkeypatch.setenv(name, value)
    place = tmp_path / "place"
    place.mkdir()
    return place


def read_notebook() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(NOTEBOOK.read_text("utf-8"))
    return content


def test_notebook_is_stored_without_outputs() -> None:
    cells = [cell for cell in read_notebook()["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 10
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.local_ray
def test_notebook_runs_from_an_empty_folder(kernel_place: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="needs the package nbclient")
    nbformat = pytest.importorskip("nbformat", reason="needs the package nbformat")
    pytest.importorskip("ipykernel", reason="needs the package ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(kernel_place)}},
    )
    client.execute()
    folder = kernel_place / "first_model"
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {
        *("model.pth", "tuned.pth", "model.onnx", "detections.json", "report.html"),
        *("anchors.png", "thresholds/operating_points.png", "model_run/loss.png"),
    } <= left
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in shown if output["output_type"] == "error"]
    # Ground truth, anchors, two results, thresholds.
    assert sum("image/png" in output.get("data", {}) for output in shown) == 5
    printed = "".join(output.get("text", "") for output in shown)
    assert "batch_size=8: no such key; nearest: run.batch (--batch)" in printed
    # It learns in so few steps: 16 images hold 1 to 3 objects each.
    scores = json.loads((folder / "detections.json").read_text())
    assert len(scores) >= 16
