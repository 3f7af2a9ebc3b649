"""Drafts from the sequence's own tokens: what followed when the same few tokens stood there.

Pure lookup, without a model. A proposer serves one sequence and reads each token once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Proposer = Callable[[Sequence[int]], Sequence[int]]  # all confirmed tokens -> drafts, maybe none
ProposerFactory = Callable[[], Proposer]

LENGTHS = (4, 3, 2)  # longest match first: it is right most often


class NGramProposer:
    """Looks up the newest tokens among the earlier ones.

    Args:
        num_drafts: Most drafts to propose.
    """

    def __init__(self, num_drafts: int) -> None:
        self._num_drafts = num_drafts
        self._follower: dict[tuple[int, ...], int] = {}  # n-gram -> position right behind it
        self._num_indexed = 0

    def __call__(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Up to `num_drafts` tokens that may follow; `token_ids` only ever grows."""
        self._index(token_ids)
        for length in LENGTHS:
            position = self._follower.get(tuple(token_ids[-length:]))
            if position is not None and len(token_ids) >= length:
                return token_ids[position : position + self._num_drafts]
        return ()

    def _index(self, token_ids: Sequence[int]) -> None:
        """Remember n-grams that something follows; the newest occurrence wins."""
        for end in range(max(1, self._num_indexed), len(token_ids)):
            for length in LENGTHS:
                if length <= end:
                    self._follower[tuple(token_ids[end - length : end])] = end
        self._num_indexed = len(token_ids)
