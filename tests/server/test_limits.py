"""Rate limits: a window that slides, headers that tell, refusals that cost nothing."""

from __future__ import annotations

import pytest
from vllm_server.config.schema import AuthSettings, Settings
from vllm_server.ops.limits import MAX_CALLERS, SlidingWindow


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_window_slides_and_refusals_do_not_count():
    clock = Clock()
    window = SlidingWindow(clock)
    for second in range(3):
        clock.now = 1000.0 + second
        assert window.hit(b"a", 3, 10).allowed
    for _ in range(100):
        verdict = window.hit(b"a", 3, 10)
        assert (verdict.allowed, verdict.remaining, verdict.reset) == (False, 0, 8.0)
    assert window.hit(b"b", 3, 10).allowed
    clock.now = 1009.9
    assert not window.hit(b"a", 3, 10).allowed
    clock.now = 1010.0
    assert window.hit(b"a", 3, 10).allowed
    assert not window.hit(b"a", 3, 10).allowed
    clock.now = 1011.0
    assert window.hit(b"a", 3, 10).allowed


def test_a_window_remembers_a_bounded_number_of_callers():
    window = SlidingWindow(Clock())
    for i in range(MAX_CALLERS + 100):
        window.hit(str(i).encode(), 1, 60)
    assert len(window._times) == MAX_CALLERS
    assert not window.hit(str(MAX_CALLERS + 99).encode(), 1, 60).allowed


def get(server, key=None, path="/v1/models"):
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return server.client.get(path, headers=headers)


def test_the_hundredth_request_passes_and_the_next_waits_for_the_window(serve):
    clock = Clock()
    settings = Settings(auth=AuthSettings(api_keys=("a", "b")))
    server = serve(settings=settings, clock=clock)
    for left in range(99, -1, -1):
        answer = get(server, "a")
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
    clock.now += 20.5
    refused = get(server, "a")
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.headers["retry-after"] == "40"
    assert refused.headers["retry-after-ms"] == "39500"
    assert refused.headers["x-ratelimit-limit-requests"] == "100"
    assert refused.headers["x-ratelimit-limit"] == "100"
    assert refused.headers["x-ratelimit-remaining"] == "0"
    assert get(server, "b").status_code == 200
    assert server.client.get("/health").status_code == 200
    assert get(server, "a", "/metrics").status_code == 200
    clock.now += 39.5
    assert get(server, "a").status_code == 200


def test_without_keys_and_limits_nothing_is_limited(serve):
    server = serve()
    answers = [get(server) for _ in range(150)]
    assert {a.status_code for a in answers} == {200}
    assert "x-ratelimit-limit" not in answers[-1].headers


def test_without_keys_a_configured_limit_counts_by_peer_whatever_it_forwards(serve):
    server = serve(settings=Settings(auth=AuthSettings(rate_limit_requests=2)), clock=Clock())
    statuses = [
        server.client.get("/v1/models", headers={"x-forwarded-for": f"1.2.3.{i}"}).status_code
        for i in range(4)
    ]
    assert statuses == [200, 200, 429, 429]


def test_zero_switches_the_limit_off(serve):
    settings = Settings(auth=AuthSettings(api_keys=("a",), rate_limit_requests=0))
    server = serve(settings=settings)
    assert {get(server, "a").status_code for _ in range(120)} == {200}


def test_a_key_may_have_its_own_limit(serve):
    limits = {"rate_limit_requests": 1, "rate_limit_window_secs": 5}
    clock = Clock()
    settings = Settings(auth=AuthSettings(api_keys=({"key": "a", "limits": limits}, "b")))
    server = serve(settings=settings, clock=clock)
    assert [get(server, "a").status_code for _ in range(2)] == [200, 429]
    assert [get(server, "b").status_code for _ in range(2)] == [200, 200]
    clock.now += 5
    assert get(server, "a").status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
def test_a_wrong_key_costs_the_right_one_nothing(serve, path):
    settings = Settings(auth=AuthSettings(api_keys=("a",), rate_limit_requests=1))
    server = serve(settings=settings, clock=Clock())
    for _ in range(5):
        assert server.client.post(path, headers={"x-api-key": "no"}).status_code == 401
    assert server.client.post(path, headers={"x-api-key": "a"}).status_code == 400
