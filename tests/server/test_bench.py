import asyncio
import json
import math
import statistics
from itertools import pairwise

import pytest
from vllm_server.bench.client import Client, Target
from vllm_server.bench.report import Report, Result, distribution, parse_goals, percentile
from vllm_server.bench.serve import ServeLoad, run
from vllm_server.bench.workload import Workload, arrivals
from vllm_traits import ConfigError


def event(value) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


class Server:
    """Speaks just enough of the API, with answers that a test chooses."""

    def __init__(self, script=None):
        self.script = script or self.stream
        self.bodies, self.active, self.most_active, self.connections = [], 0, 0, 0

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_):
        self.server.close()

    async def serve(self, reader, writer):
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                body = await reader.readexactly(length)
                if head.startswith(b"GET"):
                    self.reply(writer, b'{"data":[{"id":"tiny"}]}')
                    continue
                self.active += 1
                self.most_active = max(self.most_active, self.active)
                self.bodies.append(json.loads(body))
                await self.script(writer, json.loads(body))
                self.active -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def reply(self, writer, body, status=200):
        writer.write(
            b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (status, len(body), body)
        )

    def start_stream(self, writer):
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )

    def chunk(self, writer, data):
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))

    async def stream(self, writer, body):
        """Each event cut in the middle, so that the client has to join the halves."""
        self.start_stream(writer)
        pieces = [event({"choices": [{"text": "a"}]}) for _ in range(body["max_tokens"])]
        usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
        for data in (*pieces, event({"choices": [], "usage": usage}), event(b"[DONE]")):
            self.chunk(writer, data[:5])
            await writer.drain()
            self.chunk(writer, data[5:])
            await asyncio.sleep(0)
        self.chunk(writer, b"")


def drive(server, **settings):
    async def main():
        async with server:
            return await run(ServeLoad(server.url, **settings))

    return asyncio.run(main()).as_json()


def test_every_request_is_measured_and_counted():
    server = Server()
    figures = drive(server, workload=Workload(num_prompts=6, input_len=3, output_len=4))
    assert figures["completed"] == 6 and figures["failed"] == 0
    assert figures["output_tokens"] == 24 and figures["prompt_tokens"] == 42
    assert 0 < figures["ttft_ms"]["median"] <= figures["e2e_ms"]["median"]
    assert figures["itl_ms"] is not None and figures["tpot_ms"] is not None
    assert len(server.bodies) == 7, "one warm-up that is not counted"
    assert figures["setting"]["model"] == "tiny"
    json.dumps(figures, allow_nan=False)


def test_a_closed_loop_never_has_more_requests_in_flight_than_asked():
    server = Server()
    drive(server, workload=Workload(num_prompts=20, output_len=3), max_concurrency=3)
    assert server.most_active == 3
    assert server.connections <= 4, "connections are reused"


def test_all_at_once_has_every_request_in_flight():
    release = asyncio.Event()

    async def wait_for_all(writer, body):
        if len(server.bodies) == 20:
            release.set()
        await release.wait()
        await server.stream(writer, body)

    server = Server(wait_for_all)
    drive(server, workload=Workload(num_prompts=20, output_len=2), num_warmups=0)
    assert server.most_active == 20


def test_the_chat_endpoint_gets_messages_and_counts_reasoning_as_text():
    async def chat(writer, body):
        assert body["messages"][0]["role"] == "user"
        server.start_stream(writer)
        for delta in ({"role": "assistant", "content": ""}, {"reasoning": "h"}, {"content": "i"}):
            server.chunk(writer, event({"choices": [{"delta": delta}]}))
        server.chunk(writer, event(b"[DONE]"))
        server.chunk(writer, b"")

    server = Server(chat)
    work = Workload(num_prompts=2, as_ids=False)
    figures = drive(server, workload=work, endpoint="chat", ignore_eos=False)
    assert figures["output_tokens"] == 4, "two pieces each, counted because there is no usage"
    assert "ignore_eos" not in server.bodies[0]


async def refuse(writer, body):
    Server.reply(None, writer, b"{}", 503)


async def hang_up(writer, body):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
    raise ConnectionError


async def stop_early(writer, body):
    Server.start_stream(None, writer)
    Server.chunk(None, writer, event({"choices": [{"text": "a"}]}))
    Server.chunk(None, writer, b"")


async def fail_late(writer, body):
    Server.start_stream(None, writer)
    Server.chunk(None, writer, event({"error": {"code": "engine"}}))
    Server.chunk(None, writer, event(b"[DONE]") + b"")
    Server.chunk(None, writer, b"")


async def babble(writer, body):
    Server.start_stream(None, writer)
    Server.chunk(None, writer, event(b"{nonsense") + event(b"[DONE]"))
    Server.chunk(None, writer, b"")


async def no_http(writer, body):
    writer.write(b"hello\r\n\r\n")


async def never(writer, body):
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("script", "name"),
    [
        (refuse, "http_503"),
        (hang_up, "connection"),
        (stop_early, "no_done_event"),
        (fail_late, "stream_error"),
        (babble, "bad_event"),
        (no_http, "connection"),
        (never, "timeout"),
    ],
)
def test_failures_are_counted_by_class_and_never_as_completed(script, name):
    timeout = 0.05 if name == "timeout" else 30
    figures = drive(
        Server(script), workload=Workload(num_prompts=3), num_warmups=0, timeout=timeout
    )
    assert figures["errors"] == {name: 3}
    assert figures["completed"] == 0 and figures["ttft_ms"] is None


def test_a_server_that_is_not_there_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"Cannot reach http://127\.0\.0\.1:1.*running"):
        asyncio.run(run(ServeLoad("http://127.0.0.1:1", Workload())))
    with pytest.raises(ConfigError, match="not an http or https URL"):
        asyncio.run(run(ServeLoad("ftp://x", Workload())))


def test_a_server_that_is_not_ready_is_told_apart_from_one_without_models():
    class NotReady(Server):
        def reply(self, writer, body, status=200):
            super().reply(writer, b"{}", 503)

    with pytest.raises(ConfigError, match="status 503; wait until it is ready"):
        drive(NotReady(), workload=Workload())


def test_the_client_reads_a_plain_answer():
    async def main():
        async with Server() as server, Client(Target.parse(server.url)) as client:
            return await client.send("GET", "/v1/models")

    answer = asyncio.run(main())
    assert answer.status == 200 and json.loads(answer.body)["data"][0]["id"] == "tiny"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("localhost:8000", ("localhost", 8000, False, "")),
        ("http://h/v1/", ("h", 80, False, "")),
        ("https://h/proxy/v1", ("h", 443, True, "/proxy")),
    ],
)
def test_urls_with_and_without_version_name_the_same_target(url, expected):
    assert Target.parse(url) == expected


def test_the_same_seed_gives_the_same_work_and_another_seed_other_work():
    work = Workload(num_prompts=5, input_len=10, output_len=8, spread=0.5, seed=3)
    assert work.prompts() == work.prompts()
    assert work.prompts() != Workload(num_prompts=5, input_len=10, spread=0.5, seed=4).prompts()
    assert all(5 <= len(p.content) <= 10 and 4 <= p.output_len <= 8 for p in work.prompts())


def test_words_and_the_fixed_prompt_have_the_length_that_was_asked():
    (words,) = Workload(num_prompts=1, input_len=12, as_ids=False).prompts()
    assert len(words.content.split()) == 12
    fixed = Workload(num_prompts=3, input_len=12, dataset="fixed").prompts()
    assert len(set(fixed)) == 1


def test_json_lines_are_read_and_a_bad_line_is_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "output_len": 3}\n\n{"prompt": "b"}\n')
    prompts = Workload(num_prompts=4, dataset=str(path), output_len=9).prompts()
    assert sorted(set(prompts)) == [("a", 3), ("b", 9)]
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ConfigError, match=r"prompts\.jsonl:2: a line must look like"):
        Workload(dataset=str(path)).prompts()
    with pytest.raises(ConfigError, match="Cannot read the data set"):
        Workload(dataset="missing.jsonl").prompts()


def test_poisson_arrivals_have_the_rate_and_the_spread_of_an_exponential():
    times = arrivals(4000, rate=20.0, seed=1)
    gaps = [b - a for a, b in pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 20, rel=0.05)
    assert statistics.pstdev(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert arrivals(3, math.inf, 1) == [0.0, 0.0, 0.0]


def test_percentiles_lie_between_the_nearest_values():
    assert percentile([1, 2, 3, 4], 50) == 2.5
    assert percentile([5], 99) == 5
    assert distribution([]) is None
    assert distribution([3, 1, 2]).median == 2


def test_latencies_of_a_request_are_those_of_its_pieces():
    result = Result(start=1.0, end=2.0, times=[1.1, 1.2, 1.5], num_output_tokens=5)
    assert result.latencies() == pytest.approx({"ttft": 100, "tpot": 100, "e2e": 1000})
    assert result.gaps() == pytest.approx([100, 300])


def test_goodput_counts_requests_within_every_goal():
    results = [
        Result(0.0, 1.0, [0.1, 0.2], 7, 2),
        Result(0.0, 1.0, [0.5, 0.6], 7, 2),
        Result(0.0, 1.0, [0.1, 0.9], 7, 2),
        Result(0.0, 1.0, error="timeout"),
    ]
    report = Report({}, 2.0, results, {"ttft": 200, "tpot": 150})
    figures = report.as_json()
    assert figures["goodput_requests_per_second"] == 0.5
    assert figures["requests_per_second"] == 1.5
    table = report.as_table()
    assert "goodput (ttft:200 tpot:150)" in table and "error timeout" in table
    assert "TTFT" in table and "p99" in table


def test_goals_of_another_form_are_refused():
    assert parse_goals(["ttft:200", "tpot:50.5"]) == {"ttft": 200, "tpot": 50.5}
    for word in ("ttft", "speed:3", "ttft:x"):
        with pytest.raises(ValueError):
            parse_goals([word])
