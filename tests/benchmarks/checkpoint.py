"""How long a training stands still for a checkpoint.

    python tests/benchmarks/checkpoint.py [--quick]

ResNet50FPN with AdamW's moments and averaged weights. `copied` is what a training waits for: the
state is copied, and written while the next steps run. `written_at_once` writes the same checkpoint,
to a local folder, before it goes on; `disk_alone` writes as many bytes and does nothing else.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from run import Record, make_records, time_rounds

from retinaray.artifact import ModelCard, dump_weights
from retinaray.assembly.training import make_card, make_state
from retinaray.assembly.training_inputs import TrainingInputs
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import TrainJob
from retinaray.data.coco import load_coco
from retinaray.storage import Storage
from retinaray.training.checkpoint_files import take_snapshot, write_checkpoint
from retinaray.training.state import TrainingState


def run(quick: bool = False) -> list[Record]:
    """Make a state, and keep it in both ways."""
    backbone, num_rounds = ("ResNet10FPN", 1) if quick else ("ResNet50FPN", 7)
    card, state = make_training(backbone)
    with tempfile.TemporaryDirectory(prefix="retinaray-checkpoint-") as name:
        folder = Path(name)
        num_bytes = write(state, card, folder / "whole")

        def write_bytes() -> None:
            (folder / "bytes").write_bytes(bytes(num_bytes))

        rounds = time_rounds(
            {
                "copied": lambda: take_snapshot(state),
                "written_at_once": lambda: write(state, card, folder / "whole"),
                "disk_alone": write_bytes,
            },
            num_rounds=num_rounds,
        )
    held = rounds.outputs["copied"]
    assert isinstance(held, TrainingState)
    wanted = state.exported_state()
    assert all(torch.equal(value, wanted[key]) for key, value in held.exported_state().items())
    assert rounds.outputs["written_at_once"] == num_bytes
    return make_records(
        "checkpoint",
        rounds,
        unit="s",
        convert=lambda seconds: seconds,
        baselines={"copied": ["written_at_once"], "written_at_once": ["disk_alone"]},
        checked="the copy holds the same weights, and each round writes as many bytes",
        config={
            "backbone": backbone,
            "parameters": sum(value.numel() for value in state.model.parameters()),
            "bytes": num_bytes,
        },
    )


def make_training(backbone: str) -> tuple[ModelCard, TrainingState]:
    """A training of eighty classes after one step, with moments and averages."""
    categories = [{"id": number, "name": str(number)} for number in range(1, 81)]
    document = {"images": [{"id": 1, "file_name": "a.jpg", "height": 64, "width": 64}]}
    content = json.dumps({**document, "annotations": [], "categories": categories}).encode()
    tree = {
        "output": "model.pth",
        "model": {"backbone": backbone},
        "data": {"images": ".", "annotations": "train.json"},
    }
    job = load_from_dict(TrainJob, tree)
    inputs = TrainingInputs(load_coco(content, source="train.json"), None, (64, 64))
    card, model = make_card(job, inputs, run_id="benchmark")
    state = make_state(job, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    return card, state


def write(state: TrainingState, card: ModelCard, folder: Path) -> int:
    """A checkpoint as a run folder has it; gives the bytes of its files."""
    contents = {
        "training.pth": state.dump,
        "weights.pth": lambda: dump_weights(card, state.exported_state()),
    }
    manifest = write_checkpoint(
        str(folder), contents, run_id="benchmark", step=1, metrics={}, files=Storage()
    )
    return sum(file.num_bytes for file in manifest.files.values())


def main() -> None:
    """Print the records of this case alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ResNet10FPN, one round")
    for record in run(parser.parse_args().quick):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
