"""Backbone weights from files and names; nothing here reaches the network."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision

from retinaray.detector.backbone import Backbone, load_backbone_state
from retinaray.errors import CheckpointError
from retinaray.training.pretrained import read_backbone_weights


def forbid_download(*_: object, **__: object) -> None:
    raise AssertionError("a download was tried")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", forbid_download)


def test_read_backbone_weights_takes_the_stride_from_the_files_metadata(
    shared_data: Path,
) -> None:
    path = shared_data / "weights" / "resnet50_imagenet_msra.safetensors"
    state, stride_in_1x1 = read_backbone_weights(str(path), backbone="ResNet50FPN")
    assert stride_in_1x1
    backbone = Backbone("ResNet50FPN", norm="frozen_bn", stride_in_1x1=stride_in_1x1)
    load_backbone_state(backbone, state)
    assert torch.equal(backbone.body.conv1.weight, state["conv1.weight"])
    assert backbone.body.layer2[0].conv1.stride == (2, 2)


@pytest.mark.parametrize("metadata", [None, {"stride": "in the 3x3"}])
def test_read_backbone_weights_strides_in_the_3x3_when_the_file_says_nothing_else(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    path = tmp_path / "w.safetensors"
    tensor = torch.arange(3.0)
    safetensors.torch.save_file({"conv1.weight": tensor}, path, metadata=metadata)
    state, stride_in_1x1 = read_backbone_weights(str(path), backbone="ResNet50FPN")
    assert not stride_in_1x1
    assert torch.equal(state["conv1.weight"], tensor)


@pytest.mark.parametrize("wrapped", [False, True])
def test_read_backbone_weights_reads_a_pth_file(tmp_path: Path, wrapped: bool) -> None:
    path = tmp_path / "w.pth"
    tensor = torch.arange(3.0)
    values = {"conv1.weight": tensor}
    torch.save({"state_dict": values, "epoch": 3} if wrapped else values, path)
    state, stride_in_1x1 = read_backbone_weights(str(path), backbone="ResNet18FPN")
    assert not stride_in_1x1
    assert list(state) == ["conv1.weight"]
    assert torch.equal(state["conv1.weight"], tensor)


def test_read_backbone_weights_lists_the_names_when_the_name_is_unknown() -> None:
    with pytest.raises(
        CheckpointError,
        match="'IMAGENET1K_V9': no such file, and torchvision's weights for "
        "ResNet50FPN are DEFAULT, IMAGENET1K_V1, IMAGENET1K_V2;",
    ):
        read_backbone_weights("IMAGENET1K_V9", backbone="ResNet50FPN")


@pytest.mark.parametrize("source", ["DEFAULT", "IMAGENET1K_V1"])
def test_read_backbone_weights_has_no_names_for_resnet10(source: str) -> None:
    with pytest.raises(CheckpointError, match="for ResNet10FPN are none; give a file"):
        read_backbone_weights(source, backbone="ResNet10FPN")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("size", [0, 5, 200, -4])
def test_read_backbone_weights_refuses_a_truncated_file(
    tmp_path: Path, name: str, size: int
) -> None:
    path = tmp_path / name
    state = {"conv1.weight": torch.arange(3000.0)}
    if name == "w.pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"{name}: not a readable"):
        read_backbone_weights(str(path), backbone="ResNet18FPN")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """torch's folder of downloads, still missing."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize(
    "error", [OSError("no route to host"), RuntimeError("invalid hash value (expected ...)")]
)
def test_read_backbone_weights_says_what_to_do_when_the_download_fails(
    monkeypatch: pytest.MonkeyPatch, hub: Path, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(CheckpointError, match=r"DEFAULT: download from https://.*resnet18.*failed"):
        read_backbone_weights("DEFAULT", backbone="ResNet18FPN")


def test_read_backbone_weights_downloads_with_the_hash_in_the_name(
    monkeypatch: pytest.MonkeyPatch, hub: Path
) -> None:
    stream = io.BytesIO()
    torch.save({"conv1.weight": torch.arange(3.0)}, stream)
    digits = hashlib.sha256(stream.getvalue()).hexdigest()[:8]
    asked = []

    def download(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        asked.append((url, hash_prefix))
        Path(path).write_bytes(stream.getvalue())

    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setattr(type(weights), "url", f"https://weights/resnet18-{digits}.pth")
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        state, _ = read_backbone_weights("IMAGENET1K_V1", backbone="ResNet18FPN")
        assert torch.equal(state["conv1.weight"], torch.arange(3.0))
    assert asked == [(f"https://weights/resnet18-{digits}.pth", digits)]


@pytest.mark.parametrize("is_named_so", [False, True])
def test_read_backbone_weights_runs_no_code_of_a_file_in_the_hub_folder(
    monkeypatch: pytest.MonkeyPatch,
    hub: Path,
    make_intruder: Callable[[Path], object],
    tmp_path: Path,
    is_named_so: bool,
) -> None:
    mark = tmp_path / "was_run"
    stream = io.BytesIO()
    torch.save({"conv1.weight": make_intruder(mark)}, stream)
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    if is_named_so:
        digits = hashlib.sha256(stream.getvalue()).hexdigest()[:8]
        monkeypatch.setattr(type(weights), "url", f"https://weights/resnet18-{digits}.pth")
    hub.mkdir(parents=True)
    path = hub / weights.url.rpartition("/")[2]
    path.write_bytes(stream.getvalue())
    reason = "not a readable weights file" if is_named_so else "delete it, and it is downloaded"
    with pytest.raises(CheckpointError, match=reason):
        read_backbone_weights("IMAGENET1K_V1", backbone="ResNet18FPN")
    assert not mark.exists()
    # The file would have done it.
    torch.load(path, weights_only=False)
    assert mark.exists()
