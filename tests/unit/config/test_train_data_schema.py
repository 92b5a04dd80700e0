"""Settings of the training images' caches."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from retinaray.config.loading import load_from_argv
from retinaray.config.schema import TrainDataConfig, TrainJob


def test_load_from_argv_takes_the_flags_of_a_cache() -> None:
    line = "m.pth --annotations a --cache /mnt/x --cache-gb 1.5 --cache-decoded --cache-recheck 60"
    data = load_from_argv(TrainJob, line.split()).data
    assert (data.cache, data.cache_gb, data.cache_decoded) == ("/mnt/x", 1.5, True)
    assert data.cache_recheck_s == 60.0
    plain = load_from_argv(TrainJob, ["m.pth", "--annotations", "a"]).data
    assert (plain.cache, plain.cache_gb, plain.cache_decoded) == (None, 20.0, False)
    assert plain.cache_recheck_s == 0.0


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"cache": "s3://bucket/cache"}, r"data\.cache=s3://bucket/cache: expected a folder on a"),
        ({"cache_decoded": True}, r"data\.cache_decoded=True .* would not be used: add --cache"),
        ({"cache_recheck_s": 9.0}, r"data\.cache_recheck_s=9 without data\.cache would not be"),
        ({"cache": "x", "cache_gb": 0}, "greater than 0"),
        ({"cache": "x", "cache_recheck_s": -1}, "greater than or equal to 0"),
        ({"cache": ""}, "at least 1 character"),
    ],
)
def test_train_data_refuses_a_cache_that_cannot_be(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        TrainDataConfig.model_validate({"annotations": "a", **values})
