from __future__ import annotations

from vllm_core.scheduler.propose import NGramProposer


def test_what_followed_the_same_tokens_is_proposed() -> None:
    assert list(NGramProposer(3)([1, 2, 3, 4, 5, 9, 1, 2])) == [3, 4, 5]


def test_the_longest_match_wins_over_a_newer_shorter_one() -> None:
    assert list(NGramProposer(1)([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3])) == [7]


def test_of_equal_matches_the_newest_wins() -> None:
    assert list(NGramProposer(1)([1, 2, 7, 1, 2, 8, 1, 2])) == [8]


def test_nothing_is_proposed_where_nothing_repeats() -> None:
    proposer = NGramProposer(3)
    assert list(proposer([1])) == []
    assert list(proposer([1, 2])) == []
    assert list(proposer([1, 2, 3])) == []


def test_growing_token_by_token_equals_reading_at_once() -> None:
    tokens = [1, 2, 3, 1, 2, 3, 4, 1, 2, 3, 1, 2]
    growing = NGramProposer(2)
    for length in range(1, len(tokens) + 1):
        assert list(growing(tokens[:length])) == list(NGramProposer(2)(tokens[:length]))


def test_a_constant_tail_is_continued() -> None:
    assert list(NGramProposer(3)([5, 5, 5, 5])) == [5]
