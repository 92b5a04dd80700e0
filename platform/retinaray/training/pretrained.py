"""Backbone weights from torchvision's own downloads or from a local file."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
import torchvision
from safetensors import SafetensorError
from torch import Tensor

from retinaray.artifact import hash_content, load_tensors
from retinaray.errors import CheckpointError

_TORCHVISION_NAMES = {
    "ResNet18FPN": "resnet18",
    "ResNet34FPN": "resnet34",
    "ResNet50FPN": "resnet50",
    "ResNet101FPN": "resnet101",
    "ResNet152FPN": "resnet152",
    "MobileNetV3LargeFPN": "mobilenet_v3_large",
}


def read_backbone_weights(source: str, *, backbone: str) -> tuple[dict[str, Tensor], bool]:
    """Weights for a backbone.

    Args:
        source: A local .safetensors, .pth or .pt file, or one of torchvision's weights names for
            this network, such as DEFAULT or IMAGENET1K_V1 (downloaded into torch's hub folder).
        backbone: One of `detector.backbone.BACKBONE_NAMES`.

    Returns:
        The state dict, and whether the file says that bottlenecks stride in their first 1x1
        convolution.

    Raises:
        CheckpointError: If there is neither such a file nor such a name, or it cannot be read, or
            is not what torchvision's name stands for. No code of a file is executed.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        values = load_tensors(path.read_bytes(), source=source)
        return values.get("state_dict", values), False
    names = _list_names(backbone)
    if source not in names:
        raise CheckpointError(
            f"backbone weights {source!r}: no such file, and torchvision's weights for "
            f"{backbone} are "
            f"{', '.join(names) or 'none'}; give a file, one of these names, or leave "
            "--backbone-weights out"
        )
    url = torchvision.models.get_model_weights(_TORCHVISION_NAMES[backbone])[source].url
    path = _download(url, source)
    content = path.read_bytes()
    wanted, found = _hash_of(url), hash_content(content)
    if not found.startswith(wanted):
        raise CheckpointError(
            f"backbone weights {source}: {path} is not what {url} gives (expected SHA-256 "
            f"{wanted}..., found {found[:16]}...): delete it, and it is downloaded again"
        )
    return load_tensors(content, source=str(path)), False


def _download(url: str, source: str) -> Path:
    """The file in torch's hub folder, where other programs may have put it before."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), _hash_of(url), progress=False)
    # torch reports a download whose hash is wrong as a RuntimeError.
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"backbone weights {source}: download from {url} failed: {error}; "
            "download the file by hand and give its path"
        ) from error
    return path


def _hash_of(url: str) -> str:
    """The first digits of the file's SHA-256, which torchvision's names end with."""
    return url.rpartition("-")[2].partition(".")[0]


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], bool]:
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
        return safetensors.torch.load_file(path), "first 1x1" in json.dumps(metadata)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


def _list_names(backbone: str) -> list[str]:
    if backbone not in _TORCHVISION_NAMES:
        return []
    enum = torchvision.models.get_model_weights(_TORCHVISION_NAMES[backbone])
    return ["DEFAULT", *(member.name for member in enum)]
