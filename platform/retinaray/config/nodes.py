"""What every settings class is made of: frozen base classes, `Flag`, shared types and sections.

It knows nothing about any particular job.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

BackboneName = Literal[
    "ResNet10FPN",
    "ResNet18FPN",
    "ResNet34FPN",
    "ResNet50FPN",
    "ResNet101FPN",
    "ResNet152FPN",
    "MobileNetV3LargeFPN",
]
BackendName = Literal["auto", "openvino", "onnxruntime", "torch", "tensorrt"]


@dataclass(frozen=True)
class Flag:
    """Command-line spelling of a field.

    Attributes:
        name: Long option, such as `--batch`, or a bare word for a positional argument.
        unit: Unit shown in the help ("px", "images", "epochs"); empty when there is none.
        metavar: What the value is called in the help; derived from the type when empty.
    """

    name: str
    unit: str = ""
    metavar: str = ""


class Config(BaseModel):
    """Base of every node: immutable, no unknown keys, no NaN, help from the text below a field."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class Job(Config):
    """Base of the settings of one command.

    Attributes:
        verb: The command's name after `retinaray`.
        examples: Complete command lines for the top of its help.
    """

    verb: ClassVar[str]
    examples: ClassVar[tuple[str, ...]]


def _square_from_one_side(value: object) -> object:
    """Turn one number, alone or in a list, into two; leave everything else to the type check."""
    sides = value if isinstance(value, (list, tuple)) else [value]
    is_one_number = len(sides) == 1 and isinstance(sides[0], (int, str))
    return (sides[0], sides[0]) if is_one_number else value


def _expect_address(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError("expected an address that starts with http:// or https://")
    return value


def expect_rule(value: str) -> str:
    """Check the text of an operating-point rule: f1, precision=P, recall=R or fppi=X.

    Raises:
        ValueError: If it is none of these, or its number is out of range.
    """
    name, equals, text = value.partition("=")
    if value == "f1":
        return value
    limits = {"precision": 1.0, "recall": 1.0, "fppi": math.inf}
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if name not in limits or not equals or not 0 < number <= limits[name]:
        raise ValueError(
            "expected f1, precision=P or recall=R with a number in (0, 1], or fppi=X with X > 0"
        )
    return value


CanvasSide = Annotated[int, Field(ge=32, le=8192)]
Size = Annotated[tuple[CanvasSide, CanvasSide], BeforeValidator(_square_from_one_side)]
"""Network canvas: height and width in pixels; one number means a square."""

Location = Annotated[str, Field(min_length=1)]
"""A local path or a URI."""

Address = Annotated[str, AfterValidator(_expect_address)]
"""An HTTP endpoint."""


class ReadingConfig(Config):
    """How images are read, wherever they are."""

    endpoint_url: Annotated[Address | None, Flag("--endpoint-url", metavar="URL")] = None
    """S3 endpoint other than AWS; none = AWS_ENDPOINT_URL, else AWS."""
    max_pixels: Annotated[int, Field(ge=1), Flag("--max-pixels", unit="pixels")] = 178_956_970
    """Refuse a file that claims more pixels than this, before it is decoded."""
    max_file_bytes: Annotated[int, Field(ge=1), Flag("--max-file-bytes", unit="bytes")] = 1 << 29
    """Refuse a longer file, before it is read."""
    max_seconds: Annotated[float, Field(gt=0), Flag("--max-decode-seconds", unit="s")] = 60.0
    """Give an image up that takes longer to decode."""
    decode_memory_mib: Annotated[int, Field(ge=1), Flag("--decode-memory", unit="MiB")] = 1024
    """What decoding may take in all threads of a part together; a larger image is decoded alone."""
    allow_truncated: Annotated[bool, Flag("--allow-truncated")] = False
    """Accept JPEG files that end early (the missing part is grey)."""
    threads: Annotated[int, Field(ge=1, le=256), Flag("--read-threads", unit="threads")] = 8
    """Files fetched and decoded at once, per process."""


class ClusterConfig(Config):
    """What the job may count on in a cluster; an autoscaler may have to bring it first."""

    gpus: Annotated[int | None, Field(ge=0, le=65_536), Flag("--gpus", unit="GPUs")] = None
    """GPUs to use, waiting for those that are not there yet; none = those that are there at the
    start, 0 = no GPU even if there are any."""
    cpus: Annotated[int | None, Field(ge=1, le=10**6), Flag("--cpus", unit="CPUs")] = None
    """The same for processors."""


def require(rules: Iterable[tuple[bool, str]]) -> None:
    """Report every broken rule of a node at once.

    Args:
        rules: Pairs of "the rule holds" and the line that names the fields when it does not.

    Raises:
        ValueError: If any rule is broken; one line per broken rule.
    """
    broken = [text for holds, text in rules if not holds]
    if broken:
        raise ValueError("\n".join(broken))
