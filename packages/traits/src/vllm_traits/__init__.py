"""The protocol between an engine and a model, and the plain data that crosses it.

Knows the words the packages exchange and nothing else: no scheduling, no tensors, no text.
Standard library only.
"""

from vllm_traits.backend import BackendInfo, Done, InFlight, KVGroup, ModelBackend
from vllm_traits.batch import EMPTY, Batch, BatchOutput, Chunk, Start, StepCost
from vllm_traits.errors import (
    BackendError,
    ConfigError,
    ContextLengthError,
    DeviceError,
    InvalidRequestError,
    ModelError,
    QueueFullError,
    VllmLiteError,
    WireError,
)
from vllm_traits.grammar import Grammar
from vllm_traits.pending import Pending
from vllm_traits.request import (
    FinishReason,
    PoolingParams,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from vllm_traits.store import BlockStore

__all__ = [
    "EMPTY",
    "BackendError",
    "BackendInfo",
    "Batch",
    "BatchOutput",
    "BlockStore",
    "Chunk",
    "ConfigError",
    "ContextLengthError",
    "DeviceError",
    "Done",
    "FinishReason",
    "Grammar",
    "InFlight",
    "InvalidRequestError",
    "KVGroup",
    "ModelBackend",
    "ModelError",
    "Pending",
    "PoolingParams",
    "QueueFullError",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "Start",
    "StepCost",
    "TokenLogprobs",
    "VllmLiteError",
    "WireError",
]
