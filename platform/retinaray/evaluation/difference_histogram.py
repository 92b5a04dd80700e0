"""How far many pairs of numbers lie apart: their quantiles, in memory that does not grow."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

_LOWEST, _HIGHEST = -8, 4
_PER_DECADE = 100


class DifferenceHistogram:
    """Counts of absolute differences from 1e-8 to 1e4 on a logarithmic axis, 100 bins a decade.

    Smaller differences count as zero, larger ones as 1e4; the largest and the mean are exact.
    """

    def __init__(self) -> None:
        # The first bin holds zero, the last one everything above the axis.
        self._counts = np.zeros((_HIGHEST - _LOWEST) * _PER_DECADE + 2, dtype=np.int64)
        self._sum = 0.0
        self._max = 0.0

    def __len__(self) -> int:
        return int(self._counts.sum())

    def add(self, differences: Float[np.ndarray, " D"]) -> None:
        """Count differences, none of them negative; NaN counts as the largest.

        Args:
            differences: May be empty.
        """
        values = np.nan_to_num(differences.astype(np.float64), nan=math.inf, posinf=math.inf)
        if not len(values):
            return
        with np.errstate(divide="ignore"):
            places = np.floor((np.log10(values) - _LOWEST) * _PER_DECADE) + 1
        bins = np.clip(places, 0, len(self._counts) - 1).astype(np.int64)
        self._counts += np.bincount(bins, minlength=len(self._counts))
        self._sum += float(values.sum())
        self._max = max(self._max, float(values.max()))

    @property
    def max(self) -> float:
        """The largest difference; 0 when there is none."""
        return self._max

    @property
    def mean(self) -> float:
        """Their mean; 0 when there is none."""
        return self._sum / len(self) if len(self) else 0.0

    def quantile(self, share: float) -> float:
        """What this share of the differences does not exceed, at most 2.4 % too large.

        Args:
            share: In (0, 1].

        Returns:
            The upper end of the bin, never more than the largest difference; 0 when there is none.
        """
        total = len(self)
        if total == 0:
            return 0.0
        position = int(np.searchsorted(np.cumsum(self._counts), math.ceil(share * total)))
        if position == 0:
            return 0.0
        return float(min(10.0 ** (_LOWEST + position / _PER_DECADE), self._max))

    def bars(self, per_decade: int = 2) -> list[tuple[float, float, int]]:
        """Wide bins for a picture.

        Args:
            per_decade: Bins to a factor of ten; a divisor of 100.

        Returns:
            Lower end, upper end and count of neighbouring bins, from the first to the last that
            holds something; the first has lower end 0 when there are differences of zero. Empty
            when there is no difference.
        """
        width = _PER_DECADE // per_decade
        wide = self._counts[1:-1].reshape(-1, width).sum(axis=1)
        wide[-1] += self._counts[-1]
        filled = np.flatnonzero(wide)
        zeros = int(self._counts[0])
        bars = [] if zeros == 0 else [(0.0, 10.0**_LOWEST, zeros)]
        if len(filled):
            bars += [
                (
                    10.0 ** (_LOWEST + place / per_decade),
                    10.0 ** (_LOWEST + (place + 1) / per_decade),
                    int(wide[place]),
                )
                for place in range(int(filled[0]), int(filled[-1]) + 1)
            ]
        return bars
