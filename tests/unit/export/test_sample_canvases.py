from __future__ import annotations

import pytest
import torch

from retinaray.export.sample_canvases import make_test_canvases


@pytest.mark.parametrize("canvas", [(64, 96), (100, 133), (8, 8), (1, 1)])
def test_make_test_canvases_are_pictures_of_that_size(canvas: tuple[int, int]) -> None:
    pictures = make_test_canvases(canvas, count=3)
    assert [(picture.dtype, tuple(picture.shape)) for picture in pictures] == [
        (torch.uint8, (3, *canvas))
    ] * 3
    for one, other in zip(pictures, make_test_canvases(canvas, count=3), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(pictures[0], make_test_canvases(canvas, seed=1)[0])
    if canvas == (64, 96):
        assert all(picture.float().std() > 30 for picture in pictures)
        assert not torch.equal(pictures[0], pictures[1])
