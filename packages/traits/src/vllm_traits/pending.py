"""A result on its way; `concurrent.futures.Future` already has this shape."""

from __future__ import annotations

from typing import Protocol, TypeVar

Result = TypeVar("Result", covariant=True)


class Pending(Protocol[Result]):
    """Something launched whose result is not known yet."""

    def done(self) -> bool:
        """Whether the result is there; never blocks, and once true stays true."""
        ...

    def result(self) -> Result:
        """Block until the result is there.

        Raises:
            BackendError: The work failed as a whole.
        """
        ...
