from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from retinaray.errors import DatasetError
from retinaray.interchange.labelled_set import LabelledBox, LabelledImage, LabelledSet
from retinaray.interchange.voc import read_voc, write_voc

WriteFiles = Callable[..., Path]
MakeSet = Callable[..., LabelledSet]

DEVKIT = """\
<annotation>
  <folder>VOC2007</folder>
  <filename>000005.jpg</filename>
  <source><database>The VOC2007 Database</database></source>
  <size><width>500</width><height>375</height><depth>3</depth></size>
  <object>
    <name>chair</name><pose>Rear</pose><truncated>1</truncated><difficult>1</difficult>
    <bndbox><xmin>1</xmin><ymin>211</ymin><xmax>500</xmax><ymax>339</ymax></bndbox>
  </object>
</annotation>
"""
# What LabelImg writes: no database of a VOC year, corners from 0.
LABELIMG = DEVKIT.replace("The VOC2007 Database", "Unknown")


def test_read_voc_counts_pixels_from_one_when_the_database_is_a_voc_year(
    write_files: WriteFiles,
) -> None:
    labels = read_voc(write_files({"000005.xml": DEVKIT}))
    (box,) = labels.boxes
    # Pixels 1..500 of 500 are the whole width [0, 500]; 211..339 are [210, 339].
    assert box.xywh == (0, 210, 500, 129)
    assert box.attributes == {"truncated": True, "difficult": True, "pose": "Rear"}
    assert labels.images[0] == LabelledImage("000005.jpg", 375, 500, (box,))
    assert labels.notes == {"files of the VOC devkit, whose pixels count from 1": 1}


@pytest.mark.parametrize(
    ("text", "origin", "xywh"),
    [
        (LABELIMG, "auto", (1, 211, 499, 128)),
        (LABELIMG, "one", (0, 210, 500, 129)),
        (DEVKIT, "zero", (1, 211, 499, 128)),
    ],
)
def test_read_voc_takes_the_origin_it_is_given(
    text: str, origin: str, xywh: tuple[float, ...], write_files: WriteFiles
) -> None:
    labels = read_voc(write_files({"a.xml": text}), origin=origin)  # type: ignore[arg-type]
    assert [box.xywh for box in labels.boxes] == [xywh]
    assert labels.notes == {}


@pytest.mark.parametrize("origin", ["zero", "one"])
def test_write_voc_reads_back_the_same_when_boxes_have_fractions(
    origin: str, make_set: MakeSet, write_files: WriteFiles
) -> None:
    boxes = (
        LabelledBox("dog", (0.1, 0.2, 0.3, 49.7)),
        LabelledBox("a < b & c", (5, 6, 7, 8), is_crowd=True, attributes={"colour": "rot"}),
        LabelledBox("dog", (1, 1, 2, 2), score=0.875, attributes={"difficult": True}),
    )
    labels = make_set(*boxes, names=("dog", "a < b & c"))
    files = dict(write_voc(labels, origin=origin, source="x"))  # type: ignore[arg-type]
    assert files["ImageSets/Main/default.txt"] == "a\n"
    assert files["labelmap.txt"].splitlines()[1:] == ["dog:::", "a < b & c:::"]
    back = read_voc(write_files(files), names=labels.names, origin=origin)  # type: ignore[arg-type]
    assert back.images == labels.images


def test_write_voc_marks_crowd_as_difficult_when_a_reader_knows_no_crowd(make_set: MakeSet) -> None:
    labels = make_set(LabelledBox("dog", (5, 6, 7, 8), is_crowd=True))
    text = dict(write_voc(labels, source="x"))["Annotations/a.xml"]
    assert "<difficult>1</difficult>" in text
    assert "<xmin>5</xmin><ymin>6</ymin><xmax>12</xmax><ymax>14</ymax>" in text


def test_read_voc_takes_the_subfolder_of_the_file_when_the_name_has_none(
    write_files: WriteFiles,
) -> None:
    folder = write_files({"Annotations/x/a.xml": LABELIMG, "other/b.xml": "<no/>"})
    assert [image.file_name for image in read_voc(folder).images] == ["x/000005.jpg"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<name>chair</name>", "", r"a\.xml, line 6: expected <name> in <object>"),
        (">500</xmax>", ">wide</xmax>", r"a\.xml, line 8: expected a number, found 'wide'"),
        (">500</xmax>", ">0</xmax>", r"line 8: expected xmin < xmax .* found 1, 211, 0, 339"),
        ("</object>", "", r"a\.xml, line \d+: expected XML, found mismatched tag"),
        ("<size>", "<s>", "expected XML"),
        ("<width>500", "<width>0", r"expected <size> .* --images"),
        ("<annotation>", "<!DOCTYPE a><annotation>", r"line 1: expected no <!DOCTYPE>"),
    ],
)
def test_read_voc_names_file_and_line_when_input_is_bad(
    old: str, new: str, message: str, write_files: WriteFiles
) -> None:
    folder = write_files({"a.xml": LABELIMG.replace(old, new)})
    with pytest.raises(DatasetError, match=message):
        read_voc(folder)


def test_read_voc_takes_a_known_size_when_the_file_has_none(write_files: WriteFiles) -> None:
    text = LABELIMG.replace(LABELIMG[LABELIMG.index("<size>") : LABELIMG.index("</size>") + 7], "")
    labels = read_voc(write_files({"a.xml": text}), sizes={"000005.jpg": (30, 40)})
    assert (labels.images[0].height, labels.images[0].width) == (30, 40)


def test_write_voc_refuses_a_name_that_xml_cannot_hold(make_set: MakeSet) -> None:
    labels = make_set(LabelledBox("bad\x01", (5, 6, 7, 8)), names=("bad\x01",))
    with pytest.raises(DatasetError, match=r"set\.json: 'bad\\x01' holds a character"):
        list(write_voc(labels, source="set.json"))


def test_write_voc_leaves_the_label_map_out_when_a_name_would_break_it(make_set: MakeSet) -> None:
    files = dict(write_voc(make_set(names=("a:b",)), source="x"))
    assert "labelmap.txt" not in files
    assert files["classes.txt"] == "a:b\n"
