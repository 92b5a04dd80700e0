"""Which files are read, which are refused, and with what words."""

from __future__ import annotations

import io
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from retinaray.artifact import ModelCard
from retinaray.detector.anchors import AnchorSpec
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import CheckpointError
from retinaray.migration.odtk_weights import load_odtk_state, read_odtk_checkpoint

Save = Callable[..., bytes]
RATIOS, SCALES = [1.0, 2.0, 0.5], [4.0, 5.0, 6.0]
# What is judged before any tensor is.
EMPTY: dict[str, Any] = {"backbone": ["ResNet18FPN"], "classes": 2, "state_dict": {}}


def heads(num_outputs: int, num_offsets: int = 36) -> dict[str, torch.Tensor]:
    return {"cls_head.8.bias": torch.zeros(num_outputs), "box_head.8.bias": torch.ones(num_offsets)}


def refuse(content: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_odtk_checkpoint(content, source="dir/old.pth")
    assert str(caught.value).startswith("dir/old.pth: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("is_old", [False, True], ids=["zip", "stream"])
def test_read_odtk_checkpoint_reads_both_formats_of_torch(save: Save, is_old: bool) -> None:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    own = "backbones.ResNet18FPN."
    pairs = {
        "backbone.body.layer4.1.bn2.running_var": f"{own}features.layer4.1.bn2.running_var",
        "fpn.lateral.0.weight": f"{own}lateral3.weight",
        "fpn.smooth.2.bias": f"{own}smooth5.bias",
        "fpn.p6.weight": f"{own}pyramid6.weight",
        "class_head.tower.6.weight": "cls_head.6.weight",
        "box_head.tower.0.bias": "box_head.0.bias",
    }
    theirs = {key: torch.full((2,), float(i)) for i, key in enumerate(pairs.values())}
    state = OrderedDict({**theirs, **heads(18), f"{own}features.fc.weight": torch.ones(1)})
    values = {
        **EMPTY,
        "state_dict": state,
        "iteration": 90_000,
        "optimizer": optimizer.state_dict(),
        "scheduler": {"base_lrs": [0.01], "last_epoch": 7, "lr_lambdas": [None]},
    }
    content = save(values, is_old=is_old)
    assert content.startswith(b"PK") is not is_old
    found = read_odtk_checkpoint(content, source="old.pth")
    assert (found.backbone, found.num_classes, found.iteration) == ("ResNet18FPN", 2, 90_000)
    assert set(found.state) == {*pairs, "class_head.output.bias", "box_head.output.bias"}
    for ours, key in pairs.items():
        assert torch.equal(found.state[ours], theirs[key])


@pytest.mark.parametrize(
    ("others", "choice", "convention", "reason"),
    [
        ({}, "auto", "odtk-legacy", "lacks `ratios`: ODTK wrote it before 2020-03-27"),
        ({"ratios": RATIOS, "scales": SCALES}, "auto", "odtk", "has `ratios`"),
        ({}, "odtk", "odtk", "as asked for, although the file lacks `ratios`"),
        ({}, "odtk-legacy", "odtk-legacy", "as asked for"),
        ({"ratios": RATIOS}, "odtk-legacy", "odtk-legacy", "although the file has `ratios`"),
    ],
)
def test_read_odtk_checkpoint_chooses_the_generation_of_the_anchors(
    save: Save, others: dict[str, Any], choice: Any, convention: Any, reason: str
) -> None:
    content = save({**EMPTY, "state_dict": heads(18), **others})
    found = read_odtk_checkpoint(content, source="old.pth", anchors=choice)
    assert reason in found.anchors_reason
    scales = tuple(others.get("scales", AnchorSpec().scales))
    assert found.anchors == AnchorSpec(scales=scales, convention=convention)


def test_read_odtk_checkpoint_takes_the_anchors_of_the_file(save: Save) -> None:
    # 2 scales and 1 ratio are 2 anchors: 4 class scores, 8 offsets.
    values = {**EMPTY, "ratios": [1], "scales": [2.0, 3.0], "state_dict": heads(4, 8)}
    found = read_odtk_checkpoint(save(values), source="old.pth")
    assert found.anchors == AnchorSpec((2.0, 3.0), (1.0,), convention="odtk")


@pytest.mark.parametrize("is_old", [False, True], ids=["zip", "stream"])
def test_read_odtk_checkpoint_refuses_code_without_running_it(
    save: Save, make_intruder: Callable[[Path], object], tmp_path: Path, is_old: bool
) -> None:
    mark = tmp_path / "was_run"
    content = save({**EMPTY, "scheduler": make_intruder(mark)}, is_old=is_old)
    assert re.search(r"names code \(\w+\.mkdir\), which was not run", refuse(content))
    assert not mark.exists()
    # The file would have done it.
    torch.load(io.BytesIO(content), weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("is_old", [False, True], ids=["zip", "stream"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.999])
def test_read_odtk_checkpoint_refuses_a_truncated_file(
    save: Save, is_old: bool, part: float
) -> None:
    content = save({**EMPTY, "state_dict": heads(18)}, is_old=is_old)
    text = refuse(content[: int(part * len(content))])
    # The older format may be cut inside a name, which then is an unknown one.
    cut = re.search(r"names code \(collections\.(\w+)\)", text)
    if cut is None:
        assert re.search(r"torch can read \(\d+ bytes\)", text)
    else:
        assert is_old
        assert cut[1] != "OrderedDict"
        assert "OrderedDict".startswith(cut[1])


@pytest.mark.parametrize(
    "content",
    [b"\x89PNG\r\n\x1a\n" + bytes(100), b"ftrt" + bytes(500), b"{}", b"\x80\x02}q\x00."],
    ids=["png", "engine", "json", "pickle"],
)
def test_read_odtk_checkpoint_refuses_another_kind_of_file(content: bytes) -> None:
    assert "not a checkpoint that torch can read" in refuse(content)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (["a/retinanet_rn50fpn.pth", "a/README"], "unpack it .unzip dir/old.pth. and give a/ret"),
        (["README"], "holds README; give ODTK's .pth"),
        ([], "holds nothing; give ODTK's .pth"),
    ],
)
def test_read_odtk_checkpoint_says_what_to_do_with_a_zip_around_a_checkpoint(
    members: list[str], words: str
) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in members:
            archive.writestr(name, b"x")
    text = refuse(stream.getvalue())
    assert "found a zip archive" in text
    assert re.search(words, text)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"format": "retinaray-weights-1"}, "is a weights file of retinaray already"),
        ({}, "backbone, classes, state_dict are missing and it has none"),
        ({"model": 1, "classes": 2}, "backbone, state_dict are missing and it has model, classes"),
        ({**EMPTY, "classes": 0}, "expected a number of classes from 1, found classes=0"),
        ({**EMPTY, "classes": True}, "found classes=True"),
        ({**EMPTY, "state_dict": [1]}, "expected tensors in its state_dict"),
        ({**EMPTY, "state_dict": {"a": 1}}, "expected tensors in its state_dict"),
        ({**EMPTY, "backbone": []}, "expected the backbone's name"),
        ({**EMPTY, "backbone": 3}, "found backbone=3"),
        (
            {**EMPTY, "backbone": ["ResNet18FPN", "ResNet50FPN"]},
            "2 backbones (ResNet18FPN, ResNet50FPN) with common heads, which do not exist here",
        ),
        (
            {**EMPTY, "backbone": ["MobileNetV2FPN"]},
            "MobileNetV2FPN does not exist here.*train --backbone MobileNetV3LargeFPN",
        ),
        ({**EMPTY, "backbone": ["ResNeXt50_32x4dFPN"]}, "train --backbone ResNet50FPN"),
        ({**EMPTY, "backbone": ["VGG16FPN"]}, "VGG16FPN does not exist here, expected one of"),
        (
            {**EMPTY, "angles": [-0.5236, 0.0, 0.5236]},
            "was trained with --rotated-bbox (angles=[-0.5236, 0.0, 0.5236])",
        ),
        (
            {**EMPTY, "state_dict": heads(18, 162)},
            "expected 36 outputs for 9 anchors with 4 offsets (rotated boxes have 6), found (162,)",
        ),
        (
            {**EMPTY, "state_dict": heads(27)},
            "expected 18 outputs for 9 anchors with 2 classes, found (27,) in class_head.output",
        ),
        ({**EMPTY, "ratios": [-1.0]}, "its anchors cannot be used: anchor ratios=(-1.0,)"),
        ({**EMPTY, "ratios": 5}, "its anchors cannot be used"),
        (
            {**EMPTY, "state_dict": {"cls_head.1.weight": torch.ones(1), "x": torch.ones(1)}},
            "has 2 tensors that ODTK's ResNet18FPN lacks (cls_head.1.weight, x)",
        ),
    ],
)
def test_read_odtk_checkpoint_refuses_what_has_no_equal(
    save: Save, values: dict[str, Any], words: str
) -> None:
    pattern = ".*".join(re.escape(part) for part in words.split(".*"))
    assert re.search(pattern, refuse(save(values)))


def test_read_odtk_checkpoint_refuses_tensors_without_a_dictionary(save: Save) -> None:
    assert "not a checkpoint that torch can read" in refuse(save(torch.ones(3)))


def test_read_odtk_checkpoint_makes_half_precision_float32(save: Save) -> None:
    values = {**EMPTY, "state_dict": {k: v.half() for k, v in heads(18).items()}}
    found = read_odtk_checkpoint(save(values), source="old.pth")
    assert {value.dtype for value in found.state.values()} == {torch.float32}


def test_load_odtk_state_names_every_fault_and_changes_nothing(
    imported: tuple[ModelCard, RetinaNet],
) -> None:
    model = imported[1]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items() if "num_batches_tracked" not in k}
    del state["fpn.p6.weight"]
    state["fpn.p6.scale"] = torch.ones(1)
    state["fpn.p7.bias"] = torch.ones(3)
    state["box_head.output.bias"] = torch.full((36,), torch.nan)
    with pytest.raises(CheckpointError) as caught:
        load_odtk_state(model, state, source="old.pth")
    for words in (
        "old.pth: expected the tensors of ODTK's ResNet18FPN",
        "1 missing (fpn.p6.weight)",
        "1 unknown (fpn.p6.scale)",
        "1 of another shape (fpn.p7.bias (3,) instead of (256,))",
        "1 not finite (box_head.output.bias)",
    ):
        assert words in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
