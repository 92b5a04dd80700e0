"""Every setting of `import-odtk`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, model_validator

from retinaray.config.nodes import Flag, Job, Location, Size


def _expect_weights_name(value: str) -> str:
    if not value.endswith(".pth"):
        raise ValueError("expected a name that ends in .pth, by which the other commands know it")
    return value


class ImportOdtkJob(Job):
    """Turn a checkpoint of NVIDIA's ODTK (retinanet-examples) into a weights file."""

    verb: ClassVar[str] = "import-odtk"
    examples: ClassVar[tuple[str, ...]] = (
        "retinaray import-odtk retinanet_rn50fpn.pth coco.pth "
        "--categories annotations/instances_val2017.json",
        "retinaray import-odtk old.pth new.pth --anchors odtk-legacy --size 640 960",
    )

    model: Annotated[Location, Flag("model", metavar="IN.pth")]
    """Checkpoint that `odtk train` wrote; its code, if it holds any, is not run."""
    output: Annotated[
        Location, AfterValidator(_expect_weights_name), Flag("weights", metavar="OUT.pth")
    ]
    """Weights file to write, for every other command."""
    categories: Annotated[Location | None, Flag("--categories", metavar="FILE.json")] = None
    """COCO JSON that it was trained on, or a JSON list of names, in the order of training; none =
    class-0, class-1, ..."""
    anchors: Annotated[Literal["auto", "odtk", "odtk-legacy"], Flag("--anchors")] = "auto"
    """Generation of the anchors: odtk since March 2020, odtk-legacy before (the released COCO
    weights); auto = by what the file holds."""
    size: Annotated[Size, Flag("--size", unit="px", metavar="H W")] = (800, 1344)
    """Network canvas, which ODTK does not store; the default is its --resize 800 --max-size 1333
    for landscape images."""

    @model_validator(mode="after")
    def _check_fields_together(self) -> ImportOdtkJob:
        if self.output == self.model:
            raise ValueError(
                f"output={self.output} is the checkpoint itself, which would be lost: give "
                "another name"
            )
        return self
