"""Backends and stores without a model. They are shipped because they document the protocol.

`FakeBackend` says what it is told to; `SimBackend` computes from the blocks it finds, so that any
wrong block changes the text; `DelayedBackend` makes another one late and faulty; `violations` says
what is wrong with a scheduler.
"""

from vllm_core.testing.delayed import DelayedBackend
from vllm_core.testing.fake import FakeBackend
from vllm_core.testing.invariants import violations
from vllm_core.testing.sim import DictStore, SimBackend, next_token

__all__ = ["DelayedBackend", "DictStore", "FakeBackend", "SimBackend", "next_token", "violations"]
