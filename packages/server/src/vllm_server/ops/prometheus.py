"""`/metrics`: the engine's numbers under vLLM's names, and the server's own.

Engine values are read at scrape from one snapshot; nothing is counted twice. No label ever holds
text of a client.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from vllm_core import EngineStats

from vllm_server.openai.errors import ApiError
from vllm_server.ops.exchange import Exchange, Reply
from vllm_server.ops.routes import Call
from vllm_server.service import ServerState, Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SIZES = tuple(4.0**power for power in range(3, 14))

_COUNTERS = {
    "vllm:prefix_cache_queries": ("prefix_cache_queries", "Prompt tokens looked up."),
    "vllm:prefix_cache_hits": ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "vllm:num_preemptions": ("preemptions", "Sequences released to make room."),
    "vllm:prompt_tokens": ("prompt_tokens", "Prompt tokens processed."),
    "vllm:prompt_tokens_cached": ("cached_prompt_tokens", "Prompt tokens found in a cache."),
    "vllm:generation_tokens": ("generation_tokens", "Completion tokens generated."),
    "vllm:spec_decode_num_drafts": ("spec_drafts", "Chunks that verified drafts."),
    "vllm:spec_decode_num_draft_tokens": ("spec_draft_tokens", "Drafts verified."),
    "vllm:spec_decode_num_accepted_tokens": ("spec_accepted_tokens", "Drafts accepted."),
    "vllm_lite:requests_received": ("received", "Requests the engine accepted."),
    "vllm_lite:swap_out_blocks": ("saved_blocks", "Blocks that stores kept."),
    "vllm_lite:swap_in_blocks": ("loaded_blocks", "Blocks that stores brought."),
    "vllm_lite:steps": ("steps", "Batches launched."),
    "vllm_lite:bytes_moved": ("cost_bytes", "Weights, KV and logits that the device moved."),
    "vllm_lite:flops": ("cost_flops", "Operations of products and attention."),
    "vllm_lite:device_seconds": ("device_seconds", "Time the device was busy."),
}

_GAUGES = {
    "vllm:num_requests_running": ("num_running", "Requests in the backend."),
    "vllm:num_requests_waiting": ("num_waiting", "Requests waiting for admission."),
    "vllm:kv_cache_usage_perc": ("kv_usage", "Share of the KV blocks in use, 0 to 1."),
    "vllm_lite:requests_in_flight": ("num_in_flight", "Requests accepted and not finished."),
    "vllm_lite:cached_blocks": ("cached_blocks", "Free blocks whose content can be found."),
    "vllm_lite:sessions": ("sessions", "Sessions with pinned blocks."),
    "vllm_lite:session_pinned_blocks": ("pinned_blocks", "References held by sessions."),
}

_HISTOGRAMS = {
    "time_to_first_token": "vllm:time_to_first_token_seconds",
    "inter_token_latency": "vllm:inter_token_latency_seconds",
    "time_per_output_token": "vllm:request_time_per_output_token_seconds",
    "e2e_latency": "vllm:e2e_request_latency_seconds",
    "queue_time": "vllm:request_queue_time_seconds",
    "inference_time": "vllm:request_inference_time_seconds",
    "prefill_time": "vllm:request_prefill_time_seconds",
    "decode_time": "vllm:request_decode_time_seconds",
    "request_prompt_tokens": "vllm:request_prompt_tokens",
    "request_generation_tokens": "vllm:request_generation_tokens",
    "iteration_tokens": "vllm:iteration_tokens_total",
    "params_max_tokens": "vllm:request_params_max_tokens",
    "num_preemptions": "vllm:request_num_preemptions",
    "prefill_computed_tokens": "vllm:request_prefill_kv_computed_tokens",
}


class EngineCollector:
    """Turns one snapshot of the engine into metric families.

    Args:
        state: Has the engine, once there is one.
    """

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """Every family; only the server's own while the model is loading."""
        yield _gauge(
            "vllm_lite:http_streams_open", "Event streams open.", {}, self._state.num_streams
        )
        service = self._state.service
        if service is not None:
            yield from _engine_families(service)


def _engine_families(service: Service) -> Iterator[Metric]:
    stats = service.engine.snapshot()
    labels = {"model_name": service.card.id, "engine": "0"}
    for name, (attribute, text) in _GAUGES.items():
        yield _gauge(name, text, labels, getattr(stats, attribute))
    for name, (attribute, text) in _COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=list(labels))
        counter.add_metric(list(labels.values()), getattr(stats, attribute))
        yield counter
    yield from _labelled(stats, labels)
    yield _gauge(
        "vllm:cache_config_info",
        "Shape of the KV cache.",
        {**labels, **service.card.cache_config},
        1,
    )
    yield from _proven(service, labels)
    for attribute, histogram in stats.histograms():
        name = _HISTOGRAMS.get(attribute)
        if name is not None:
            family = HistogramMetricFamily(name, f"{attribute} of requests.", labels=list(labels))
            bounds = [*(repr(float(b)) for b in histogram.buckets), "+Inf"]
            buckets = list(zip(bounds, map(float, histogram.cumulative()), strict=True))
            family.add_metric(list(labels.values()), buckets, histogram.sum)
            yield family


def _proven(service: Service, labels: Mapping[str, str]) -> Iterator[Metric]:
    """What is known about results, and the kernels' scores of the start."""
    findings = service.findings
    if findings is None:
        return
    text = "1 if no result depends on the batch, as far as is known."
    yield _gauge("vllm_lite:deterministic", text, labels, findings.deterministic)
    check = findings.self_check
    if check is None or check.read_bandwidth is None:
        return
    yield _gauge(
        "vllm_lite:read_bandwidth_bytes_per_second",
        "Memory reads, measured at the start.",
        labels,
        check.read_bandwidth,
    )
    shares = GaugeMetricFamily(
        "vllm_lite:kernel_bandwidth_share",
        "Share of the read bandwidth that a kernel reached at the start, for one row.",
        labels=[*labels, "kernel"],
    )
    for kernel, share in check.shares.items():
        shares.add_metric([*labels.values(), kernel], share)
    yield shares


def _labelled(stats: EngineStats, labels: Mapping[str, str]) -> Iterator[Metric]:
    """Counters with a label of their own."""
    finished = CounterMetricFamily(
        "vllm:request_success", "Requests finished.", labels=[*labels, "finished_reason"]
    )
    for reason, count in stats.finished.items():
        finished.add_metric([*labels.values(), reason.value], count)
    yield finished
    rejected = CounterMetricFamily(
        "vllm:admission_rejections", "Requests refused.", labels=[*labels, "reason"]
    )
    rejected.add_metric([*labels.values(), "max_num_queued_reqs"], stats.rejected_queue_full)
    yield rejected
    accepted = CounterMetricFamily(
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "Drafts accepted by place in the chunk.",
        labels=[*labels, "position"],
    )
    for position, count in enumerate(stats.spec_accepted_per_position):
        accepted.add_metric([*labels.values(), str(position)], count)
    yield accepted
    faults = CounterMetricFamily("vllm_lite:faults", "Faults.", labels=[*labels, "stage"])
    faults.add_metric([*labels.values(), "batch"], stats.batch_faults)
    faults.add_metric([*labels.values(), "store"], stats.store_faults)
    yield faults


def _gauge(name: str, text: str, labels: Mapping[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


class HttpMetrics:
    """What the HTTP layer counts itself.

    Args:
        state: For the engine's part of a scrape.
    """

    def __init__(self, state: ServerState) -> None:
        self.registry = CollectorRegistry()
        by_status = ("handler", "method", "status")
        by_route = ("handler", "method")
        self._requests = Counter(
            "http_requests_total", "HTTP requests.", by_status, registry=self.registry
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "Time to the end of the answer.",
            by_route,
            buckets=_LATENCIES,
            registry=self.registry,
        )
        self._received = Histogram(
            "http_request_size_bytes",
            "Size of request bodies.",
            by_route,
            buckets=_SIZES,
            registry=self.registry,
        )
        self._sent = Histogram(
            "http_response_size_bytes",
            "Size of answers.",
            by_route,
            buckets=_SIZES,
            registry=self.registry,
        )
        self._rejected = Counter(
            "vllm_lite:requests_rejected_total",
            "Requests refused before the engine, by error code.",
            ("reason",),
            registry=self.registry,
        )
        self.rate_limited = Counter(
            "vllm_lite:rate_limited_total", "Requests over a rate limit.", registry=self.registry
        )
        self.auth_failures = Counter(
            "vllm_lite:auth_failures_total",
            "Requests without a sufficient key.",
            registry=self.registry,
        )
        self.registry.register(EngineCollector(state))  # pyright: ignore[reportArgumentType]

    def observe(self, exchange: Exchange) -> None:
        """Count a finished exchange; the route's pattern stands for its path."""
        method = exchange.method if exchange.method in _METHODS else "other"
        route = (exchange.handler, method)
        self._requests.labels(*route, str(exchange.status)).inc()
        self._seconds.labels(*route).observe(time.perf_counter() - exchange.started)
        self._received.labels(*route).observe(exchange.num_received)
        self._sent.labels(*route).observe(exchange.num_sent)

    def reject(self, error: ApiError) -> None:
        """Count an error answer."""
        self._rejected.labels(error.code).inc()

    async def scrape(self, call: Call) -> Reply:
        """The metrics as text."""
        text: bytes = generate_latest(self.registry)
        return Reply(text, content_type=CONTENT_TYPE)


_METHODS: frozenset[Any] = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
