"""Train, export, infer and evaluate as a user does, each in a process of its own."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from retinaray.artifact import read_weights

pytestmark = pytest.mark.local_ray

RunScript = Callable[..., subprocess.CompletedProcess[str]]

DATA = ("--images", "data/images", "--annotations", "data/train.json")
TRAINING = (
    *(*DATA, "--val-images", "data/images", "--val-annotations", "data/val.json"),
    *("--backbone", "ResNet10FPN", "--fpn-channels", "16", "--head-depth", "0"),
    *("--classes", "10", "--size", "64", "96", "--batch", "4", "--epochs", "3"),
    *("--precision", "fp32", "--log-every", "1"),
)
TEST_SET = ("--images", "data/images", "--annotations", "data/test.json")


@dataclass(frozen=True)
class Chain:
    """What the four commands printed: their last lines, and all of stderr."""

    results: dict[str, dict[str, Any]]
    logs: dict[str, str]


@pytest.fixture(scope="module")
def chain(run_script: RunScript) -> Chain:
    """The commands one after another, each on what the one before wrote."""
    commands = {
        "train": ("model.pth", *TRAINING),
        "export": ("model.pth", "model.onnx"),
        "infer": ("model.onnx", *TEST_SET, "--output", "found.json", "--score-threshold", "0"),
        "evaluate": ("found.json", "--annotations", "data/test.json"),
    }
    results, logs = {}, {}
    for name, arguments in commands.items():
        answer = run_script(name, *arguments)
        assert answer.returncode == 0, answer.stderr
        results[name] = json.loads(answer.stdout.splitlines()[-1])
        logs[name] = answer.stderr
    return Chain(results, logs)


def test_train_prints_what_it_left(chain: Chain, workplace: Path) -> None:
    result = chain.results["train"]
    assert result["model"] == str(workplace / "model.pth")
    assert result["run_folder"] == str(workplace / "model_run")
    assert (result["steps"], result["exit_code"]) == (6, 0)
    assert result["metrics"]["AP"] >= 0
    assert result["metrics"]["step"] in (2, 4, 6)
    assert "8 training images, 3 validation images, 10 classes" in chain.logs["train"]
    assert (workplace / "model_run" / "loss.png").exists()


def test_export_prints_what_it_left(chain: Chain, workplace: Path) -> None:
    result = chain.results["export"]
    assert result["canvas"] == [64, 96]
    assert result["num_bytes"] == (workplace / "model.onnx").stat().st_size
    assert result["parity"]["candidates"]["num_missing"] == 0


def test_infer_prints_what_it_left(chain: Chain, workplace: Path) -> None:
    result = chain.results["infer"]
    detections = json.loads((workplace / "found.json").read_bytes())
    assert result["detections"] == str(workplace / "found.json")
    assert result["run"] == str(workplace / "found_run")
    assert result["totals"] == {
        "num_parts": 1,
        "num_images": 6,
        "num_errors": 0,
        "num_detections": len(detections),
    }
    assert result["images_per_s"] > 0


def test_evaluate_gives_the_scores_that_infer_printed(chain: Chain) -> None:
    scores = chain.results["infer"]["scores"]
    assert scores["num_detections"] > 0
    assert {key: chain.results["evaluate"][key] for key in scores} == scores


def test_anchors_prints_json_alone_and_draws_a_picture(
    workplace: Path, start_command: Callable[..., subprocess.Popen[str]]
) -> None:
    size = ("--size", "64", "96", "--levels", "2-7")
    annotations = ("--annotations", "data/train.json")
    process = start_command("-m", "retinaray", "anchors", *annotations, *size, "--fit", "--json")
    out, err = process.communicate()
    assert process.returncode == 0, err
    result = json.loads(out)
    assert set(result["by_size"]) == {"small", "medium", "large"}
    assert sum(row["count"] for row in result["by_class"].values()) == result["all"]["count"]
    # 16 x 24 cells of four pixels, a quarter of them at each level up, nine anchors each.
    assert result["anchors_per_image"] == 9 * (16 * 24 + 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1 * 1)
    fitted, default = result["fit"]["at_this_size"], result["fit"]["default"]
    assert fitted["share_iou_0.5"] >= default["share_iou_0.5"]
    assert "IoU>=0.5 %" not in err
    assert (workplace / "anchor_coverage.png").read_bytes().startswith(b"\x89PNG")


def test_thresholds_writes_a_model_that_evaluate_reports_on(
    chain: Chain,
    workplace: Path,
    start_command: Callable[..., subprocess.Popen[str]],
    run_script: RunScript,
) -> None:
    validation = ("--images", "data/images", "--annotations", "data/val.json")
    arguments = ("thresholds", "model.pth", *validation, "--rule", "recall=0.5")
    process = start_command("-m", "retinaray", *arguments, "--output", "tuned.pth")
    out, err = process.communicate()
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["num_settings"] > 100
    card, _ = read_weights((workplace / "tuned.pth").read_bytes(), source="tuned.pth")
    chosen = [entry["threshold"] for entry in result["classes"].values()]
    assert list(card.score_thresholds) == chosen
    answer = run_script("evaluate", "tuned.pth", *TEST_SET, "--backend", "torch")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["num_images"] == 6
    assert chain.results["train"]["model"] == str(workplace / "model.pth")


def test_commands_leave_no_token_that_changes_other_clusters(chain: Chain, workplace: Path) -> None:
    assert chain.results
    assert not (workplace / "home" / ".ray" / "auth_token").exists()


@pytest.mark.slow
def test_train_resumes_when_its_driver_was_killed(
    chain: Chain,
    workplace: Path,
    start_command: Callable[..., subprocess.Popen[str]],
    wait_until: Callable[[Callable[[], object], str], None],
) -> None:
    arguments = ("-m", "retinaray", "train", "killed.pth", *TRAINING)
    run_folder = workplace / "killed_run"
    image = sorted((workplace / "data" / "images").glob("train*"))[0]
    content = image.read_bytes()
    image.unlink()
    os.mkfifo(image)
    process = start_command(*arguments)
    try:
        # The first epoch gets the image; the second waits for it in vain.
        wait_until(lambda: _feed(image, content), "the first reading of the image")
        wait_until(
            lambda: any("step_00000002" in p.read_text() for p in run_folder.rglob("*snap*.json")),
            "the first checkpoint",
        )
    finally:
        process.kill()
        process.communicate()
        image.unlink()
        image.write_bytes(content)
    assert not (workplace / "killed.pth").exists()

    again = start_command(*arguments)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert "resuming run" in err
    assert json.loads(out.splitlines()[-1])["metrics"] == chain.results["train"]["metrics"]
    events = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    steps = [event["step"] for event in events if event["kind"] == "progress"]
    # Step 3 comes twice if it was reached before the image was waited for.
    assert steps in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 3, 4, 5, 6])
    wanted = _read_tensors(workplace / "model_run" / "last.pth")
    found = _read_tensors(run_folder / "last.pth")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def _feed(pipe: Path, content: bytes) -> bool:
    """Give a reader the content; False while there is none."""
    try:
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "wb") as writer:
        writer.write(content)
    return True


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    return dict(read_weights(path.read_bytes(), source=str(path))[1].state_dict())


@pytest.mark.parametrize(
    ("name", "arguments", "code", "message"),
    [
        pytest.param(
            "infer",
            ("absent.onnx", "--images", "data/images"),
            2,
            "absent.onnx: no such file",
            id="missing model",
        ),
        pytest.param(
            "train",
            ("other.pth", *DATA, "--classes", "3"),
            2,
            "3",
            id="contradictory classes",
        ),
        pytest.param(
            "train",
            ("other.pth", *DATA, "--size", "64", "96", "--anchor-scales", "40", "--strict-anchors"),
            2,
            "run.strict_anchors=true",
            id="anchors that reach nothing",
        ),
        pytest.param(
            "evaluate",
            ("found.json", "--annotations", "home/torn.json"),
            2,
            "home/torn.json",
            id="unreadable annotations",
        ),
    ],
)
def test_command_says_in_one_line_what_is_wrong(
    name: str,
    arguments: tuple[str, ...],
    code: int,
    message: str,
    run_script: RunScript,
    workplace: Path,
) -> None:
    (workplace / "home" / "torn.json").write_text('{"images": [')
    answer = run_script(name, *arguments)
    assert answer.returncode == code
    assert answer.stdout == ""
    assert "Traceback" not in answer.stderr
    assert answer.stderr.count("error: ") == 1
    assert message in answer.stderr.partition("error: ")[2]
    assert not (workplace / "other_run").exists()
