"""Choice by hash: the same everywhere, as many as asked, evenly."""

from __future__ import annotations

import hashlib
import random

import pytest

from retinaray.inference.hash_choice import (
    NUM_HASHES,
    HashTally,
    hash_uri,
    is_chosen,
    limit_for_share,
)
from retinaray.inference.pipeline import ImageSource

SOURCES = [ImageSource(number, f"s3://b/image {number}.jpg") for number in range(5000)]


def choose(limit: int, seed: int = 0) -> list[ImageSource]:
    return [source for source in SOURCES if is_chosen(source, limit=limit, seed=seed)]


def test_hash_uri_is_the_keyed_blake2b_of_the_text() -> None:
    wanted = hashlib.blake2b("é".encode(), digest_size=8, key=bytes(7) + b"\x05").digest()
    assert hash_uri("é", 5) == int.from_bytes(wanted, "big")
    assert hash_uri("é", -1) != hash_uri("é", 5)
    assert 0 <= hash_uri("\udcff", 0) < NUM_HASHES  # a byte of a file name that is no text


@pytest.mark.parametrize("number", [0, 1, 17, 4999, 5000])
def test_tally_limit_chooses_exactly_so_many_whatever_the_order(number: int) -> None:
    limits = set()
    for seed in range(3):
        tally = HashTally(number, seed=9)
        for source in random.Random(seed).sample(SOURCES, len(SOURCES)):
            tally.add(source)
        limits.add(tally.limit)
    assert len(limits) == 1
    chosen = choose(limits.pop(), seed=9)
    assert len(chosen) == number
    by_hash = sorted(SOURCES, key=lambda source: hash_uri(source.uri, 9))
    assert set(map(id, chosen)) == set(map(id, by_hash[:number]))


def test_tally_limit_chooses_all_when_there_are_fewer() -> None:
    tally = HashTally(10)
    for source in SOURCES[:9]:
        tally.add(source)
    assert tally.limit == NUM_HASHES
    assert all(is_chosen(source, limit=tally.limit, seed=0) for source in SOURCES)


def test_another_seed_chooses_others() -> None:
    limit = limit_for_share(0.1)
    first, second = ({s.image_id for s in choose(limit, seed)} for seed in (0, 1))
    # 500 of 5000 each, and 50 in common, within five standard deviations (21 and 7).
    assert 395 < len(first) < 605
    assert 395 < len(second) < 605
    assert 15 < len(first & second) < 85


def test_limit_for_share_covers_the_ends_and_refuses_the_rest() -> None:
    assert limit_for_share(0) == 0
    assert limit_for_share(1) == NUM_HASHES
    assert choose(limit_for_share(0)) == []
    assert len(choose(limit_for_share(1))) == 5000
    with pytest.raises(ValueError, match=r"share from 0 to 1, got 1\.5"):
        limit_for_share(1.5)
