"""Metrics: exact counts, promised names, and no series that clients can make."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families


def metrics(server):
    text = server.client.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (s.name, *sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(text.text)
        for s in family.samples
    }


LABELS = (("engine", "0"), ("model_name", "tiny"))


def test_metrics_count_tokens_exactly_and_gauges_return_to_zero(serve):
    server = serve("Hello!")
    for _ in range(3):
        server.chat("hi")
    server.complete("abc", max_tokens=2)
    found = metrics(server)
    assert found["vllm:prompt_tokens_total", *LABELS] == 3 * 21 + 3
    assert found["vllm:generation_tokens_total", *LABELS] == 3 * 7 + 2
    assert found["vllm:num_requests_running", *LABELS] == 0
    assert found["vllm:kv_cache_usage_perc", *LABELS] == 0
    stop = ("engine", "0"), ("finished_reason", "stop"), ("model_name", "tiny")
    assert found["vllm:request_success_total", *stop] == 3
    assert found["vllm:time_to_first_token_seconds_count", *LABELS] == 4
    assert found["vllm:iteration_tokens_total_count", *LABELS] > 0
    chat = ("handler", "/v1/chat/completions"), ("method", "POST"), ("status", "200")
    assert found["http_requests_total", *chat] == 3
    assert found["vllm_lite:http_streams_open",] == 0


MANDATORY = [
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info",
    "prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total",
    "prompt_tokens_total", "generation_tokens_total", "request_success_total",
    "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket",
    "request_time_per_output_token_seconds_bucket", "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket", "request_inference_time_seconds_bucket",
    "request_prefill_time_seconds_bucket", "request_decode_time_seconds_bucket",
    "request_prompt_tokens_bucket", "request_generation_tokens_bucket",
    "iteration_tokens_total_bucket",
]  # fmt: skip


def test_every_promised_metric_is_there_with_its_labels(serve):
    server = serve(card={"cache_config": {"block_size": "16"}})
    names = {name for name, *_ in metrics(server)}
    assert {f"vllm:{name}" for name in MANDATORY} <= names
    info = [k for k in metrics(server) if k[0] == "vllm:cache_config_info"]
    assert ("block_size", "16") in info[0]


def test_wild_names_do_not_become_series(serve):
    server = serve()
    for i in range(50):
        server.client.get(f"/wild/{i}")
        server.client.request(f"WILD{i}", "/health/live")
        server.chat(model=f"m{i}")
    assert len([n for n, *_ in metrics(server) if n == "http_requests_total"]) < 10


def test_metrics_are_served_while_loading(serve):
    assert serve(loaded=False).client.get("/metrics").status_code == 200
