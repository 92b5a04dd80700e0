"""Which of the images that were found a run takes: patterns, sizes, dates, the first n, a sample.

Everything streams; a sample of n images holds n of them.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import NamedTuple

from retinaray.errors import ConfigError, DatasetError
from retinaray.inference.hash_choice import hash_uri, limit_for_share
from retinaray.inference.pipeline import Scalar, TarMember

_WHOLE_TARS = "exclude (whole tars)"
_DETAILS = ("min_bytes", "max_bytes", "modified_after", "modified_before")


class FoundImage(NamedTuple):
    """An image, or a tar of images, before it is chosen and numbered.

    Attributes:
        name: Path below the place that was named; what patterns are matched with.
        uri: See `ImageSource`.
        member: Where it lies in its tar.
        num_bytes: Its length; none when no listing told it.
        modified_s: When its file was last written, seconds since 1970 UTC; none likewise.
        image_id: From a manifest or a COCO file; none = to be numbered.
        columns: From a manifest.
    """

    name: str
    uri: str
    member: TarMember | None = None
    num_bytes: int | None = None
    modified_s: float | None = None
    image_id: int | str | None = None
    columns: Mapping[str, Scalar] | None = None


@dataclass(frozen=True, kw_only=True)
class SourceChoice:
    """What is taken of the images that are found; by default all.

    Attributes:
        include: Patterns of which one must match; none = everything. `*`, `?` and `[a-z]` stay
            within a folder, `**` stands for any folders; a pattern without a slash is matched with
            the last part of the name, one with a slash with the whole name below the place that was
            named. In a tar the name is the tar's, a slash and the member's.
        exclude: Patterns of which none may match; a tar whose own name matches is not opened.
        min_bytes: Smaller files are left out.
        max_bytes: Larger files are left out.
        modified_after: Files last written before this are left out; without a zone it is UTC. Of an
            image in a tar the tar's date counts.
        modified_before: Files last written at this moment or later are left out.
        limit: Of what remains the first so many.
        sample: Of what remains so many (a whole number), or a share of it (between 0 and 1), chosen
            by a hash of the URI; in the order of the listing.
        seed: Another seed gives another sample.

    Raises:
        ConfigError: If values contradict each other; all faults at once.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_bytes: int | None = None
    max_bytes: int | None = None
    modified_after: datetime | None = None
    modified_before: datetime | None = None
    limit: int | None = None
    sample: int | float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        faults = list(self._find_faults())
        if faults:
            raise ConfigError("; ".join(faults))

    def _find_faults(self) -> Iterator[str]:
        for pattern in (*self.include, *self.exclude):
            try:
                compile_patterns((pattern,))
            except ValueError as error:
                yield str(error)
        low, high = self.min_bytes, self.max_bytes
        if low is not None and high is not None and low > high:
            yield f"min_bytes={low} is above max_bytes={high}: nothing could be left"
        start, end = _to_seconds(self.modified_after), _to_seconds(self.modified_before)
        if start is not None and end is not None and start >= end:
            yield (
                f"modified_after={self.modified_after} is not before "
                f"modified_before={self.modified_before}: nothing could be left"
            )
        if self.limit is not None and self.limit < 1:
            yield f"limit={self.limit}: expected 1 or more"
        if self.sample is not None and not _is_sample(self.sample):
            yield (
                f"sample={self.sample}: expected a whole number of images from 1 on, or a share "
                "between 0 and 1"
            )
        if self.limit is not None and self.sample is not None:
            yield f"limit={self.limit} and sample={self.sample} are both given: keep one of them"

    @property
    def needs_details(self) -> bool:
        """Whether lengths and dates must be known."""
        return any(getattr(self, name) is not None for name in _DETAILS)


def _is_sample(value: float) -> bool:
    return value >= 1 if isinstance(value, int) else 0 < value < 1


def parse_moment(text: str) -> datetime:
    """A moment from its ISO 8601 text: a date is its midnight; without a zone it is UTC.

    Raises:
        ConfigError: If it is none.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(
            f"expected a date such as 2026-05-31 or 2026-05-31T14:30+02:00, got {text!r}"
        ) from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _to_seconds(moment: datetime | None) -> float | None:
    if moment is None:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


class SourceSieve:
    """Applies a choice to one stream of images, and can say what became of them.

    Args:
        choice: What is taken.
        origin: The place that was named, for messages.
    """

    def __init__(self, choice: SourceChoice, origin: str) -> None:
        self.choice = choice
        self._origin = origin
        self._removed: Counter[str] = Counter()
        self._num_found = 0
        self._tests = list(_make_tests(choice))
        self._is_excluded = compile_patterns(choice.exclude)

    def expect_no_details(self, kind: str) -> None:
        """Refuse lengths and dates, of which a list of names knows nothing.

        Raises:
            ConfigError: If the choice asks for them.
        """
        asked = [name for name in _DETAILS if getattr(self.choice, name) is not None]
        if asked:
            raise ConfigError(
                f"{', '.join(asked)}: {self._origin} is {kind}, which does not tell these of its "
                "images; give a folder or prefix, or drop the settings"
            )

    def expect_no_dates(self, kind: str) -> None:
        """Refuse dates, of which a file that was not listed is not asked.

        Raises:
            ConfigError: If the choice asks for them.
        """
        if self.choice.modified_after or self.choice.modified_before:
            raise ConfigError(
                f"modified_after, modified_before: {self._origin} is {kind}, which was not listed; "
                "give its folder or prefix, or drop the settings"
            )

    def admits_shard(self, name: str) -> bool:
        """Whether a tar is to be opened; its images are judged one by one later."""
        if not self._is_excluded(name):
            return True
        self._removed[_WHOLE_TARS] += 1
        return False

    def choose(self, found: Iterable[FoundImage]) -> Iterator[FoundImage]:
        """The images that are taken, in their order.

        Raises:
            DatasetError: If none is left; it says what removed them.
        """
        admitted = filter(self._admits, found) if self._tests else map(self._count, found)
        chosen = _draw(admitted, self.choice)
        first = next(chosen, None)
        if first is not None:
            yield first
            yield from chosen
        elif self._num_found or self._removed:
            raise DatasetError(self._explain_nothing())

    def _count(self, image: FoundImage) -> FoundImage:
        self._num_found += 1
        return image

    def _admits(self, image: FoundImage) -> bool:
        self._num_found += 1
        for label, passes in self._tests:
            if not passes(image):
                self._removed[label] += 1
                return False
        return True

    def _explain_nothing(self) -> str:
        labels = [label for label, _ in self._tests]
        num_left = self._num_found - sum(self._removed[label] for label in labels)
        removed = [
            f"{label} removed {self._removed[label]}"
            for label in (_WHOLE_TARS, *labels)
            if self._removed[label]
        ]
        if num_left:
            removed.append(f"sample={self.choice.sample} chose none of {num_left}")
        return (
            f"{self._origin}: no image is left of {self._num_found} that were found: "
            f"{'; '.join(removed)}. Widen these settings"
        )


def _make_tests(choice: SourceChoice) -> Iterator[tuple[str, Callable[[FoundImage], bool]]]:
    """What an image must pass, with its label, in the order in which it is tried."""
    low, high = choice.min_bytes, choice.max_bytes
    start, end = _to_seconds(choice.modified_after), _to_seconds(choice.modified_before)
    if choice.include:
        included = compile_patterns(choice.include)
        yield f"include={' '.join(choice.include)}", lambda image: included(image.name)
    if choice.exclude:
        excluded = compile_patterns(choice.exclude)
        yield f"exclude={' '.join(choice.exclude)}", lambda image: not excluded(image.name)
    if low is not None:
        yield f"min_bytes={low}", lambda image: (image.num_bytes or 0) >= low
    if high is not None:
        yield f"max_bytes={high}", lambda image: (image.num_bytes or 0) <= high
    if start is not None:
        label = f"modified_after={choice.modified_after}"
        yield label, lambda image: (image.modified_s or 0.0) >= start
    if end is not None:
        label = f"modified_before={choice.modified_before}"
        yield label, lambda image: (image.modified_s or 0.0) < end


def _draw(images: Iterable[FoundImage], choice: SourceChoice) -> Iterator[FoundImage]:
    if choice.sample is None:
        return islice(images, choice.limit)
    if isinstance(choice.sample, int):
        return _sample_number(images, choice.sample, choice.seed)
    limit = limit_for_share(choice.sample)
    return (image for image in images if hash_uri(image.uri, choice.seed) < limit)


def _sample_number(images: Iterable[FoundImage], number: int, seed: int) -> Iterator[FoundImage]:
    """The images with the smallest hashes, in their order."""
    kept: list[tuple[int, int, FoundImage]] = []
    for position, image in enumerate(images):
        # Negative, so that the largest hash is on top; of equal ones the later image.
        entry = (-hash_uri(image.uri, seed), -position, image)
        if len(kept) < number:
            heapq.heappush(kept, entry)
        elif entry > kept[0]:
            heapq.heapreplace(kept, entry)
    for _, _, image in sorted(kept, key=lambda entry: -entry[1]):
        yield image


def compile_patterns(patterns: Iterable[str]) -> Callable[[str], bool]:
    """A function that says whether any of some patterns matches a name.

    Args:
        patterns: As `SourceChoice.include` explains them; none match nothing.

    Raises:
        ValueError: If a pattern is empty or cannot be understood.
    """
    names: list[str] = []
    paths: list[str] = []
    for pattern in patterns:
        if not pattern.strip("/"):
            raise ValueError(f"pattern {pattern!r}: expected a name such as *.jpg or photos/**")
        (paths if "/" in pattern else names).append(_translate(pattern.lstrip("/")))
    try:
        # `.` matches line ends too: file names may hold them.
        name = re.compile("|".join(names) or "(?!)", re.DOTALL)
        path = re.compile("|".join(paths) or "(?!)", re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern {' '.join(patterns)!r}: {error}") from error
    return lambda text: bool(name.fullmatch(text.rpartition("/")[2]) or path.fullmatch(text))


def _translate(pattern: str) -> str:
    parts = pattern.split("/")
    regex = [
        (".+" if last else "(?:.+/)?")
        if part == "**"
        else "".join(map(_translate_token, re.findall(r"\[!?\]?[^\]]*\]|.", part, re.DOTALL)))
        + ("" if last else "/")
        for part, last in ((part, index == len(parts) - 1) for index, part in enumerate(parts))
    ]
    return "".join(regex)


def _translate_token(token: str) -> str:
    if token in ("*", "?"):
        return "[^/]" + "*" * (token == "*")
    if len(token) == 1:
        return re.escape(token)
    body = token[1:-1].replace("\\", r"\\").replace("[", r"\[")
    is_negative = body.startswith("!")
    body = body[1:] if is_negative else body
    # `]` and `^` right after the bracket stand for themselves.
    first = f"\\{body[0]}" if body[:1] in ("]", "^") else body[:1]
    return f"(?!/)[{'^' if is_negative else ''}{first}{body[1:]}]"
