"""A histogram with fixed buckets; plain numbers that somebody else renders."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate


class Histogram:
    """Counts of observed values by bucket.

    Args:
        buckets: Upper bounds, inclusive and ascending; a last bucket without bound is implied.

    Attributes:
        buckets: The upper bounds.
        counts: Values per bucket, one more than there are bounds; not cumulative.
        sum: Sum of all values.
    """

    __slots__ = ("buckets", "counts", "sum")

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self.buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        """How many values were observed."""
        return sum(self.counts)

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, or several equal ones."""
        self.counts[bisect_left(self.buckets, value)] += times
        self.sum += value * times

    def cumulative(self) -> list[int]:
        """Values at or below each bound; the last entry counts them all."""
        return list(accumulate(self.counts))

    def copy(self) -> Histogram:
        """An independent copy."""
        twin = Histogram(self.buckets)
        twin.counts = self.counts.copy()
        twin.sum = self.sum
        return twin
