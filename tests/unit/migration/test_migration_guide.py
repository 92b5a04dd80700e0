"""docs/migrating_from_odtk.md against the parser: what it says of each flag of ODTK's is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from retinaray.config.loading import load_from_argv, read_request
from retinaray.config.schema import ExportJob, InferJob, Job, TrainJob
from retinaray.errors import ConfigError

GUIDE = Path(__file__).parents[3] / "docs" / "migrating_from_odtk.md"

# Every flag of `odtk train | infer | export` 0.2.6, and the one before the verb.
FLAGS = {
    "train": """--annotations --images --backbone --classes --batch --resize --max-size --jitter
        --iters --milestones --schedule --full-precision --lr --warmup --gamma --override
        --val-annotations --val-images --val-iters --post-metrics --fine-tune --logdir --with-apex
        --with-dali --augment-rotate --augment-free-rotate --augment-brightness --augment-contrast
        --augment-saturation --augment-hue --regularization-l2 --rotated-bbox --anchor-ious
        --absolute-angle --master""",
    "infer": """--images --annotations --output --batch --resize --max-size --with-apex --with-dali
        --full-precision --rotated-bbox --master""",
    "export": """--size --full-precision --int8 --calibration-batches --calibration-images
        --calibration-table --verbose --rotated-bbox --dynamic-batch-opts --master""",
}
MINIMAL: dict[str, tuple[type[Job], str]] = {
    "train": (TrainJob, "model.pth --annotations train.json"),
    "infer": (InferJob, "model.pth --images photos"),
    "export": (ExportJob, "model.pth model.onnx"),
}
# What a flag needs beside it.
BESIDE = {
    "train --schedule": "--iters 10",
    "train --val-images": "--val-annotations val.json",
    "infer --resize": "--max-size 1333",
    "infer --max-size": "--resize 800",
    "export --int8": "--calibration-images data",
    "export --calibration-images": "--int8",
}


def read_rows() -> list[tuple[str, str, str]]:
    """Verb, command line and answer of each row below `## Flag by flag`."""
    text = GUIDE.read_text("utf-8").partition("## Flag by flag")[2].partition("\n## ")[0]
    rows = []
    for section in text.split("\n### ")[1:]:
        verb = section.partition("\n")[0].strip()
        found = re.findall(r"^\| `(--[^`]+)` \| (.+?) \|$", section, re.MULTILINE)
        rows += [(verb, line, answer) for line, answer in found]
    return rows


ROWS = read_rows()


def test_guide_has_each_flag_of_odtk_once() -> None:
    for verb, flags in FLAGS.items():
        listed = [line.split()[0] for row_verb, line, _ in ROWS if row_verb == verb]
        assert sorted(listed) == sorted(flags.split())


@pytest.mark.parametrize(
    ("verb", "line", "answer"), ROWS, ids=[f"{verb} {line.split()[0]}" for verb, line, _ in ROWS]
)
def test_guide_says_what_the_parser_does(verb: str, line: str, answer: str) -> None:
    job_class, minimal = MINIMAL[verb]
    flag = line.split()[0]
    argv = [*minimal.split(), *line.split(), *BESIDE.get(f"{verb} {flag}", "").split()]
    if answer.startswith("yes"):
        assert read_request(job_class, argv).job is not None
        return
    assert answer.startswith("no: ")
    with pytest.raises(ConfigError) as caught:
        load_from_argv(job_class, argv)
    (fault,) = str(caught.value).splitlines()
    assert fault.startswith(f"{flag}: ")
    # What the guide says to use instead is what the command says.
    for word in re.findall(r"`(--[\w-]+)[^`]*`", answer):
        assert word in fault
