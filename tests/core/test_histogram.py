from __future__ import annotations

from vllm_core import Histogram
from vllm_core.metrics.stats import count_buckets


def test_a_value_on_a_bound_belongs_to_the_bucket_below() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]
    assert histogram.cumulative() == [2, 4, 5]
    assert histogram.count == 5 and histogram.sum == 8.0


def test_several_equal_values_are_counted_at_once() -> None:
    histogram = Histogram((1.0,))
    histogram.observe(0.5, times=4)
    assert histogram.count == 4 and histogram.sum == 2.0


def test_a_copy_is_independent() -> None:
    histogram = Histogram((1.0,))
    twin = histogram.copy()
    histogram.observe(0.5)
    assert twin.count == 0 and histogram.count == 1


def test_token_buckets_are_a_1_2_5_series_up_to_the_context() -> None:
    assert count_buckets(100) == (1, 2, 5, 10, 20, 50, 100)
    assert count_buckets(512) == (1, 2, 5, 10, 20, 50, 100, 200, 500)
