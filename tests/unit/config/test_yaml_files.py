from __future__ import annotations

import re
from pathlib import Path

import pytest

from retinaray.config.yaml_files import parse_yaml, read_yaml, write_yaml


def test_parse_yaml_gives_tree_and_lines() -> None:
    file = parse_yaml("output: m.pth\n\ndata:\n  resize: 640\n", "job.yaml")
    assert file.tree == {"output": "m.pth", "data": {"resize": 640}}
    assert file.lines == {"output": 1, "data": 3, "data.resize": 4}
    assert file.faults == []
    assert file.is_readable


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_parse_yaml_has_no_settings_when_empty(text: str) -> None:
    file = parse_yaml(text, "job.yaml")
    assert (file.tree, file.faults, file.is_readable) == ({}, [], True)


def test_parse_yaml_reports_every_repeated_key() -> None:
    text = "data:\n  resize: 1\n  images: x\n  resize: 2\noutput: a\noutput: b\n"
    assert parse_yaml(text, "job.yaml").faults == [
        "job.yaml, line 4, column 3: data.resize is given twice, first in line 2; keep one",
        "job.yaml, line 6, column 1: output is given twice, first in line 5; keep one",
    ]


def test_parse_yaml_takes_the_same_key_in_two_sections() -> None:
    file = parse_yaml("a:\n  size: 1\nb:\n  size: 2\n", "job.yaml")
    assert file.faults == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("data: [1, 2\nrun: 3\n", r"job\.yaml, line 2, column 4: not YAML: .*expected ',' or ']'"),
        ("a: 1\n\tb: 2\n", r"job\.yaml, line 2, column 1: not YAML: .*is a tab; indent by spaces"),
        ("a: !!python/object:os.x {}\n", r"job\.yaml, line 1, column 4: not YAML: .*constructor"),
        ("a: 1\n---\nb: 2\n", r"job\.yaml, line 2, column 1: not YAML: .*single document"),
        (
            "{images: [], annotations: [], categories: []}",
            r"job\.yaml: is a COCO data set; give it",
        ),
        ("- 1\n- 2\n", r"job\.yaml: expected sections and keys"),
        ("just words\n", r"job\.yaml: expected sections and keys, as in `data:`; got 'just words'"),
        ("a: 2026-13-01\n", r"job\.yaml: not YAML: month must be in 1\.\.12"),
        ("a: \x00\n", r"job\.yaml: not YAML: .*special characters are not allowed"),
    ],
)
def test_parse_yaml_says_where_the_text_is_not_yaml(text: str, fault: str) -> None:
    file = parse_yaml(text, "job.yaml")
    assert not file.is_readable
    assert file.tree == {}
    (line,) = file.faults
    assert re.match(fault, line)


def test_parse_yaml_refuses_a_key_that_is_no_word() -> None:
    (fault,) = parse_yaml("data:\n  5: x\n", "job.yaml").faults
    assert fault == "job.yaml, line 2, column 3: the key data.5 must be a word; quote it"


def test_parse_yaml_ends_when_a_node_contains_itself() -> None:
    assert parse_yaml("data: &self\n  inner: *self\n", "job.yaml").is_readable


def test_read_yaml_reports_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"output: \xe4.pth\n")
    missing = read_yaml(str(tmp_path / "none.yaml"))
    folder = read_yaml(str(tmp_path))
    assert missing.faults[0].endswith("YAML file (--config)")
    assert "No such file" in missing.faults[0]
    misspelt = read_yaml(str(tmp_path / "latni.yaml"))
    assert misspelt.faults[0].endswith(f"; nearest: {latin}")
    assert "Is a directory" in folder.faults[0]
    assert "byte 8 is not UTF-8" in read_yaml(str(latin)).faults[0]
    assert not missing.is_readable
    assert not folder.is_readable


def test_read_yaml_refuses_a_data_set_before_it_is_parsed(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_bytes(b"[" + b"0," * 600_000 + b"0]")
    (fault,) = read_yaml(str(tmp_path / "train.json")).faults
    assert "has 1,200,003 bytes; expected settings, which are short" in fault


@pytest.mark.parametrize(
    "value", ["none", "null", "yes", "1e-3", "0x10", "", " x ", "ä", 1e-05, 0.1 + 0.2, None, True]
)
def test_write_yaml_is_read_back_unchanged(value: object) -> None:
    tree = {"section": {"key": value, "list": [value, value]}}
    assert parse_yaml(write_yaml(tree), "text").tree == tree
