"""Patterns, sizes, dates, limits and samples, and what is said when nothing is left."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from retinaray.errors import ConfigError, DatasetError
from retinaray.inference.hash_choice import hash_uri
from retinaray.inference.source_filters import (
    FoundImage,
    SourceChoice,
    SourceSieve,
    compile_patterns,
    parse_moment,
)

NAMES = ["a.jpg", "b.png", "s/a.jpg", "s/t/c.JPG", "t/a.jpg"]


def find(names: list[str], **details: Any) -> Iterator[FoundImage]:
    return (FoundImage(name, f"s3://b/{name}", **details) for name in names)


def choose(found: Iterator[FoundImage], **settings: Any) -> list[str]:
    sieve = SourceSieve(SourceChoice(**settings), "s3://b")
    return [image.name for image in sieve.choose(found)]


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("*.jpg", ["a.jpg", "s/t/a.jpg", ".jpg", "x\ny.jpg"], ["a.JPG", "a.jpg.png", "a.jpg/b"]),
        ("a?.jpg", ["ab.jpg", "s/a日.jpg"], ["a.jpg", "abc.jpg", "a/.jpg"]),
        ("[a-c]*", ["a", "s/b.jpg"], ["d", "A"]),
        ("[!a-c]*", ["d", "s/^"], ["a", "s/b.jpg"]),
        ("[]^!]", ["]", "^", "!"], ["a", "[", "\\"]),
        ("[[\\]", ["[", "\\"], ["]", "a"]),
        ("a[b.jpg", ["a[b.jpg"], ["ab.jpg", "a.jpg"]),
        ("a+(b)|c.$", ["a+(b)|c.$"], ["aab", "c"]),
        ("s/*.jpg", ["s/a.jpg"], ["s/t/a.jpg", "x/s/a.jpg", "a.jpg"]),
        ("/*.jpg", ["a.jpg"], ["s/a.jpg"]),
        ("s/**", ["s/a.jpg", "s/t/a.jpg"], ["s", "ss/a.jpg", "a.jpg"]),
        ("**/a.jpg", ["a.jpg", "s/a.jpg", "s/t/a.jpg"], ["sa.jpg", "s/ba.jpg"]),
        ("s/**/a.jpg", ["s/a.jpg", "s/t/u/a.jpg"], ["s/ba.jpg", "a.jpg"]),
        ("x.tar/**", ["x.tar/a.jpg", "x.tar/s/a.jpg"], ["y.tar/a.jpg"]),
    ],
)
def test_compile_patterns_matches_names_or_paths(
    pattern: str, matching: list[str], others: list[str]
) -> None:
    matches = compile_patterns([pattern])
    assert [name for name in matching if not matches(name)] == []
    assert [name for name in others if matches(name)] == []


def test_compile_patterns_takes_any_of_several_and_none_for_none() -> None:
    matches = compile_patterns(["*.jpg", "s/*.png", "t/**"])
    assert [matches(name) for name in ("x/a.jpg", "s/a.png", "a.png", "t/u/v")] == [
        *(True, True, False, True)
    ]
    assert not compile_patterns([])("a.jpg")


def test_choose_takes_all_in_order_by_default() -> None:
    assert choose(find(NAMES)) == NAMES


def test_choose_applies_include_and_exclude() -> None:
    assert choose(find(NAMES), include=("*.jpg",)) == ["a.jpg", "s/a.jpg", "t/a.jpg"]
    assert choose(find(NAMES), include=("*.jpg",), exclude=("s/**",)) == ["a.jpg", "t/a.jpg"]
    assert choose(find(NAMES), exclude=("a.*", "*.png")) == ["s/t/c.JPG"]


def test_choose_keeps_both_ends_of_sizes_and_the_start_of_dates() -> None:
    sizes = [FoundImage(str(size), "x", num_bytes=size) for size in (0, 9, 10, 11, 20, 21)]
    assert choose(iter(sizes), min_bytes=10, max_bytes=20) == ["10", "11", "20"]
    assert choose(iter(sizes), max_bytes=9) == ["0", "9"]
    noon = datetime(2026, 5, 1, 12, tzinfo=UTC)
    moments = [noon + timedelta(seconds=offset) for offset in (-1, 0, 3599, 3600)]
    dated = [
        FoundImage(str(m.hour * 100 + m.second), "x", modified_s=m.timestamp()) for m in moments
    ]
    later = noon.replace(hour=13)
    assert choose(iter(dated), modified_after=noon, modified_before=later) == ["1200", "1259"]


def test_dates_without_a_zone_are_utc() -> None:
    image = FoundImage("a", "x", modified_s=datetime(2026, 5, 1, tzinfo=UTC).timestamp())
    east = datetime(2026, 5, 1, 2, tzinfo=timezone(timedelta(hours=2)))
    for after in (datetime(2026, 5, 1), east):
        assert choose(iter([image]), modified_after=after) == ["a"]
        with pytest.raises(DatasetError, match=r"modified_after=2026-05-01.* removed 1"):
            choose(iter([image]), modified_after=after + timedelta(seconds=1))


@pytest.mark.parametrize(
    ("text", "hour"),
    [
        ("2026-05-01", 0),
        ("2026-05-01T12:30", 12.5),
        ("2026-05-01 12:30:00Z", 12.5),
        ("2026-05-01T12:30+02:00", 10.5),
    ],
)
def test_parse_moment_reads_iso_texts_as_utc_unless_they_have_a_zone(
    text: str, hour: float
) -> None:
    assert parse_moment(text) == datetime(2026, 5, 1, tzinfo=UTC) + timedelta(hours=hour)


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "01.05.2026", "1777593600.5"])
def test_parse_moment_refuses_other_texts(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a date such as 2026-05-31 or .*, got "):
        parse_moment(text)


def test_limit_takes_the_first_and_looks_no_further() -> None:
    def endless() -> Iterator[FoundImage]:
        number = 0
        while True:
            yield FoundImage(f"{number}.{'jpg' if number % 2 else 'png'}", "x")
            number += 1

    assert choose(endless(), include=("*.jpg",), limit=3) == ["1.jpg", "3.jpg", "5.jpg"]


def test_sample_takes_the_smallest_hashes_in_the_order_of_the_images() -> None:
    names = [f"{number:04}.jpg" for number in range(2000)]
    order = sorted(names, key=lambda name: hash_uri(f"s3://b/{name}", 3))
    assert choose(find(names), sample=50, seed=3) == sorted(order[:50])
    assert choose(find(names[::-1]), sample=50, seed=3) == sorted(order[:50], reverse=True)
    assert choose(find(names), sample=5000, seed=3) == names
    limit = round(0.1 * 2**64)
    below = [name for name in names if hash_uri(f"s3://b/{name}", 3) < limit]
    assert choose(find(names), sample=0.1, seed=3) == below
    assert set(order[:100]) < set(below) < set(order[:300])


def test_sample_takes_the_earlier_of_two_that_are_the_same_file() -> None:
    twice = [FoundImage(name, "s3://b/x") for name in ("first", "second")]
    assert choose(iter(twice), sample=1) == ["first"]


def test_sample_holds_no_more_than_it_takes() -> None:
    def measure(count: int) -> int:
        tracemalloc.start()
        try:
            assert len(choose(find([f"{number}" for number in range(count)]), sample=100)) == 100
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    names_s = 60  # bytes of each name, which the test itself holds
    assert measure(20_000) - measure(2000) < 18_000 * (names_s + 8) + 50_000


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"include": ("*.bmp",)},
            r"s3://b: no image is left of 5 that were found: include=\*\.bmp removed 5\. Widen",
        ),
        (
            {"include": ("*.jpg", "*.JPG"), "exclude": ("a*",), "min_bytes": 8},
            r"of 5 .*: include=\*\.jpg \*\.JPG removed 1; exclude=a\* removed 3; "
            r"min_bytes=8 removed 1\.",
        ),
        ({"sample": 1e-9}, r"of 5 that were found: sample=1e-09 chose none of 5"),
    ],
)
def test_choose_says_what_removed_how_many_when_nothing_is_left(
    settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(DatasetError, match=text):
        choose(find(NAMES, num_bytes=7), **settings)


def test_choose_gives_nothing_when_nothing_was_found() -> None:
    assert choose(iter([]), include=("*.jpg",)) == []


def test_admits_shard_counts_the_tars_it_leaves_out() -> None:
    sieve = SourceSieve(SourceChoice(exclude=("b.tar", "old/**")), "s3://b")
    assert [sieve.admits_shard(name) for name in ("a.tar", "s/b.tar", "old/a.tar")] == [
        *(True, False, False)
    ]
    with pytest.raises(DatasetError, match=r"exclude \(whole tars\) removed 2"):
        list(sieve.choose(iter([])))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"min_bytes": 5, "max_bytes": 4}, "min_bytes=5 is above max_bytes=4"),
        ({"limit": 0}, "limit=0: expected 1 or more"),
        ({"sample": 0}, "sample=0: expected a whole number"),
        ({"sample": 1.0}, r"sample=1\.0: expected a whole number .* or a share"),
        ({"sample": -0.5}, "sample=-0.5: expected"),
        ({"limit": 1, "sample": 2}, "limit=1 and sample=2 are both given"),
        ({"include": ("",)}, "pattern '': expected a name"),
        ({"exclude": ("/",)}, "pattern '/': expected a name"),
        ({"include": ("[z-a]",)}, r"pattern '\[z-a\]': bad character range"),
        (
            {"modified_after": datetime(2026, 2, 1), "modified_before": datetime(2026, 1, 1)},
            "modified_after=2026-02-01 00:00:00 is not before modified_before=2026-01-01",
        ),
        ({"limit": 0, "min_bytes": 2, "max_bytes": 1}, "min_bytes=2 .*; limit=0"),
    ],
)
def test_source_choice_refuses_what_contradicts_itself(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SourceChoice(**settings)
