"""Scheduling, paged KV accounting and the engine loop over any backend of the protocol.

Knows token ids and blocks; no tensors, no text, no HTTP. Standard library only.
"""

from vllm_core.async_engine import AsyncEngine, EngineHealth
from vllm_core.config import SchedulerConfig
from vllm_core.engine import Engine
from vllm_core.metrics.histogram import Histogram
from vllm_core.metrics.stats import EngineStats
from vllm_core.scheduler.scheduler import Scheduler
from vllm_core.streams import RequestStream, SyncStream

__all__ = [
    "AsyncEngine",
    "Engine",
    "EngineHealth",
    "EngineStats",
    "Histogram",
    "RequestStream",
    "Scheduler",
    "SchedulerConfig",
    "SyncStream",
]
