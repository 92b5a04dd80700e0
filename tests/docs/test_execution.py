"""The pages as a reader follows them: their commands one after another, in one fresh folder each.

What a page's directives leave out is left out here. One local Ray serves all pages.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from retinaray import cli

pytestmark = pytest.mark.local_ray

# The bucket that the pages' examples name.
BUCKET = "bucket"


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `data` as pages begin with: eight training, four validation, six test images."""
    # The packages of the extra `demo` are imported only where they are needed.
    from retinaray.demo.scenes import make_scene_set

    folder = tmp_path_factory.mktemp("scenes") / "data"
    make_scene_set(folder, num_train=8, num_val=4, num_test=6, image_size=(96, 128))
    return folder


@pytest.fixture
def page_folder(
    tmp_path: Path, scenes: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The folder in which a reader stands: `data/` and the repository's `jobs/`."""
    folder = tmp_path / "work"
    folder.mkdir()
    shutil.copytree(scenes, folder / "data")
    (folder / "jobs").symlink_to(repository / "jobs", target_is_directory=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """Weights of a small network that finds boxes in every image, wherever they are."""
    import torch

    from retinaray.artifact import dump_weights
    from retinaray.assembly.training import make_card, read_inputs
    from retinaray.config.loading import load_from_dict
    from retinaray.config.schema import TrainJob

    path = tmp_path_factory.mktemp("model") / "model.pth"
    tree: dict[str, Any] = {
        "output": str(path),
        "model": {"backbone": "ResNet10FPN", "fpn_channels": 16, "head_depth": 0},
        "data": {
            "images": str(scenes / "images"),
            "annotations": str(scenes / "train.json"),
            "size": [64, 96],
        },
    }
    job = load_from_dict(TrainJob, tree)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        card, model = make_card(job, read_inputs(job), run_id="untrained")
    _spread_scores(model)
    path.write_bytes(dump_weights(card, model.state_dict()))
    return path


def _spread_scores(network: Any) -> None:
    """Scores about 0.1 that differ: enough for what compares files, and for thresholds."""
    weights = network.state_dict()
    weights["class_head.output.bias"].fill_(-2.2)
    weights["class_head.output.weight"].mul_(20)


@pytest.fixture(scope="module")
def ray_cluster(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Ray on this machine, shared by all pages."""
    from retinaray.distributed.resources import connect

    server = request.getfixturevalue("s3_server")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        # Workers inherit the credentials; the address comes with the command.
        for name, value in server.environment().items():
            patch.setenv(name, value)
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        with connect(min_cpus=2) as cluster:
            yield cluster


@pytest.fixture
def prepare(
    page_folder: Path, request: pytest.FixtureRequest
) -> Callable[[Any, Any], tuple[str, ...]]:
    """Bring about what a command's setups name; gives the arguments that it takes besides.

    A page's files are made once, before the first block that names them.
    """
    made: set[str] = set()

    def bring(command: Any, page: Any) -> tuple[str, ...]:
        arguments: tuple[str, ...] = ()
        for name in command.setups:
            if name not in made:
                _make_setup(name, page, page_folder, request)
                made.add(name)
            if name == "s3" and any("s3://" in word for word in command.words):
                server = request.getfixturevalue("s3_server")
                arguments = ("--endpoint-url", server.endpoint_url)
        return arguments

    return bring


def _make_setup(name: str, page: Any, folder: Path, request: pytest.FixtureRequest) -> None:
    if name in page.files:
        (folder / name).write_text(page.files[name], encoding="utf-8")
    elif name == "s3":
        _fill_bucket(request.getfixturevalue("s3_server"), folder)
    elif name == "demo_run":
        (folder / "demo_run").mkdir()
        (folder / "demo_run" / "data").symlink_to(folder / "data")
        data = ("--images", "data/images", "--annotations", "data/train.json")
        small = ("--backbone", "ResNet10FPN", "--fpn-channels", "16", "--head-depth", "0")
        more = ("--val-annotations", "data/val.json", "--size", "64", "96", "--epochs", "2")
        _run_quietly(["train", "demo_run/model.pth", *data, *small, *more, "--batch", "4"])
    elif name == "retinanet_rn18fpn.pth":
        _write_odtk(request.getfixturevalue("write_odtk_checkpoint"), folder / name)
    else:
        # Asked for when it is needed: it takes torch.
        shutil.copy(request.getfixturevalue("tiny_model"), folder / "model.pth")
        if name == "model.onnx":
            _run_quietly(["export", "model.pth", "model.onnx"])


def _write_odtk(write: Callable[[Any, Path], None], path: Path) -> None:
    import torch

    from retinaray.detector.retinanet import RetinaNet

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = RetinaNet(backbone="ResNet18FPN", num_classes=10, norm="bn").eval()
    _spread_scores(network)
    write(network, path)


def _run_quietly(argv: list[str]) -> None:
    from retinaray.cli import main

    assert main([*argv, "--json", "--quiet"]) == 0


def _fill_bucket(server: Any, folder: Path) -> None:
    from retinaray.storage import Storage

    server.create_bucket(BUCKET)
    storage = Storage(endpoint_url=server.endpoint_url)
    for path in sorted((folder / "data" / "images").iterdir()):
        storage.write_bytes(f"s3://{BUCKET}/images/{path.name}", path.read_bytes())


@pytest.fixture
def follow(
    page_folder: Path,
    prepare: Callable[..., tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Any], list[tuple[str, dict[str, Any]]]]:
    """Run the commands of a page; gives verb and JSON line of each that ended well."""

    def run(page: Any) -> list[tuple[str, dict[str, Any]]]:
        done = []
        for command in page.commands:
            if command.needs:
                continue
            more = prepare(command, page)
            if command.argv is None:
                if command.is_for_shell:
                    run_in_shell(command.words, page_folder)
                continue
            capsys.readouterr()
            argv = [*command.argv, *command.extra, *more]
            with monkeypatch.context() as patch:
                for name, value in command.environment:
                    patch.setenv(name, value)
                code = cli.main(argv)
            heard = capsys.readouterr()
            said = f"{command.place}: retinaray {' '.join(argv)}\n{heard.err[-3000:]}"
            assert code == command.exit_code, said
            if command.output:
                (page_folder / command.output).write_text(heard.out, encoding="utf-8")
            if code != 2 and argv[0] in cli.VERBS and "--print-config" not in argv:
                done.append((argv[0], json.loads(heard.out.splitlines()[-1])))
        return done

    return run


def run_in_shell(words: tuple[str, ...], folder: Path) -> None:
    program = sys.executable if words[0] == "python" else words[0]
    answer = subprocess.run(
        [program, *words[1:]], cwd=folder, env=os.environ, capture_output=True, check=False
    )
    assert answer.returncode == 0, (words, answer.stderr.decode())


@pytest.fixture
def judge(
    follow: Callable[..., Any], list_keys: Callable[[str], set[str]]
) -> Callable[[Any], list[str]]:
    """Follow a page; gives what it did not do, and keys of JSON lines that no reference has."""

    def run(page: Any) -> list[str]:
        done = follow(page)
        verbs = [
            command.argv[0]
            for command in page.commands
            if command.argv and not command.needs and command.exit_code != 2
            if "--print-config" not in command.argv
        ]
        undone = [] if [verb for verb, _ in done] == verbs else [f"expected {verbs}, did {done}"]
        return undone + [
            f"docs/hooks/contracts.py does not know {sorted(keys)} of {verb}"
            for verb, line in done
            if (keys := set(line) - list_keys(verb))
        ]

    return run


def test_short_page_does_what_it_says(short_page: Any, judge: Callable[[Any], list[str]]) -> None:
    assert judge(short_page) == []
    assert any(command.argv and not command.needs for command in short_page.commands)


@pytest.mark.slow
def test_page_does_what_it_says(
    long_page: Any, ray_cluster: object, judge: Callable[[Any], list[str]]
) -> None:
    assert judge(long_page) == []


@pytest.mark.slow
def test_wrong_page_is_noticed(follow: Callable[..., Any], read_text: Callable[[str], Any]) -> None:
    absent = "```sh\nretinaray doctor --annotations absent.json\n```\n"
    with pytest.raises(AssertionError, match=r"page\.md:2: retinaray doctor"):
        follow(read_text(absent))
    assert follow(read_text(f"<!-- expect: exit 2 -->\n{absent}")) == []
