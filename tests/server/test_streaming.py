"""What happens between the lines of a stream: disconnects, silence, slow readers, faults."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from vllm_server.config.schema import ServerSettings, Settings
from vllm_traits import FinishReason, RequestOutput


class Caller:
    """A client that drives the application by hand."""

    def __init__(self, app, path="/v1/chat/completions", body=None, **more):
        body = body or {"messages": [{"role": "user", "content": "hi"}]}
        self.app = app
        self.path = path
        self.body = json.dumps({**body, **more}).encode()
        self.gone = asyncio.Event()
        self.sent = []
        self.news = asyncio.Event()
        self.block = None
        self.cut = False
        self._asked = False

    async def receive(self):
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if self.block is not None:
            await self.block.wait()
        self.sent.append(message)
        self.news.set()

    def start(self):
        def cut():
            self.cut = True

        scope = {
            "type": "http", "method": "POST", "path": self.path, "raw_path": self.path.encode(),
            "headers": [(b"host", b"localhost")], "query_string": b"",
            "client": ("127.0.0.1", 1), "extensions": {"vllm_lite.cut": cut},
        }  # fmt: skip
        return asyncio.create_task(self.app(scope, self.receive, self.send))

    async def until(self, condition):
        async with asyncio.timeout(20):
            while not condition(self):
                self.news.clear()
                await self.news.wait()

    @property
    def status(self):
        return self.sent[0]["status"]

    @property
    def text(self):
        return b"".join(m.get("body", b"") for m in self.sent[1:]).decode()


class SilentStream:
    """A request that says what it is told to, when it is told to."""

    request_id = "silent"

    def __init__(self):
        self.outputs = asyncio.Queue()
        self.aborted = asyncio.Event()

    def abort(self, reason=None):
        self.aborted.set()

    def __aiter__(self):
        return self

    async def __anext__(self):
        return await self.outputs.get()


def with_stream(server):
    """Put a silent stream where the engine was."""
    stream = SilentStream()

    class Engine:
        def generate(self, request):
            return stream

    server.state.service = replace(server.state.service, engine=Engine())
    return stream


async def idle(server):
    async with asyncio.timeout(20):
        while (
            server.state.num_open
            or server.engine.snapshot().num_in_flight
            or server.engine.snapshot().kv_usage
        ):
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_while_tokens_come_frees_everything(serve, stream, n):
    server = serve(lambda prompt: (70,) * 4000, step_seconds=0.002)

    async def run():
        caller = Caller(server.app, stream=stream, n=n)
        task = caller.start()
        if stream:
            await caller.until(lambda c: len(c.sent) > 4)
        else:
            async with asyncio.timeout(20):
                while server.engine.snapshot().generation_tokens < 5:
                    await asyncio.sleep(0.001)
        caller.gone.set()
        await task
        await idle(server)
        stats = server.engine.snapshot()
        assert stats.kv_usage == 0
        assert stats.finished[FinishReason.ABORT] == n
        assert stats.generation_tokens < 4000 * n

    asyncio.run(run())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", None),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/embeddings", {"input": "hi"}),
    ],
)
def test_a_client_that_leaves_before_the_first_token_aborts(serve, stream, path, body):
    server = serve()
    silent = with_stream(server)

    async def run():
        more = {} if path.endswith("embeddings") else {"stream": stream}
        caller = Caller(server.app, path, body, **more)
        task = caller.start()
        async with asyncio.timeout(20):
            while not server.state.num_open:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
            caller.gone.set()
            await task
            await silent.aborted.wait()
        assert caller.sent == []
        assert server.state.num_open == 0

    asyncio.run(run())


def test_a_client_that_leaves_in_the_middle_of_its_body_is_forgotten(serve):
    server = serve()

    async def run():
        caller = Caller(server.app)
        caller.gone.set()
        caller._asked = True
        await caller.start()
        assert caller.sent == []

    asyncio.run(run())


def test_a_request_without_tokens_in_time_is_504(serve):
    server = serve(settings=Settings(server=ServerSettings(request_timeout=0.1)))

    async def run(stream):
        with_stream(server)
        caller = Caller(server.app, stream=stream)
        await caller.start()
        assert caller.status == 504
        assert json.loads(caller.text)["error"]["code"] == "generation_timeout"

    for stream in (True, False):
        asyncio.run(run(stream))


def test_silence_is_filled_with_comments_and_the_head_comes_with_the_first(serve):
    server = serve(settings=Settings(server=ServerSettings(sse_keep_alive_interval=0.02)))
    silent = with_stream(server)

    async def run():
        caller = Caller(server.app, stream=True)
        task = caller.start()
        await caller.until(lambda c: len(c.sent) >= 4)
        assert caller.status == 200
        assert set(caller.text.split("\n\n")) == {": keep-alive", ""}
        silent.outputs.put_nowait(RequestOutput("x", (70,), FinishReason.LENGTH))
        async with asyncio.timeout(20):
            await task
        assert '"role":"assistant"' in caller.text
        assert caller.text.endswith("data: [DONE]\n\n")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("reason", "error", "code"),
    [
        (FinishReason.ERROR, "boom /path", "internal_error"),
        (FinishReason.ERROR, "engine_unavailable", "engine_unavailable"),
        (FinishReason.ABORT, None, "draining"),
    ],
)
def test_a_fault_after_the_first_token_is_an_event_and_then_the_end_mark(
    serve, reason, error, code
):
    server = serve()
    silent = with_stream(server)

    async def run():
        caller = Caller(server.app, stream=True)
        task = caller.start()
        silent.outputs.put_nowait(RequestOutput("x", (70,)))
        await caller.until(lambda c: len(c.sent) >= 2)
        silent.outputs.put_nowait(RequestOutput("x", (), reason, error=error))
        async with asyncio.timeout(20):
            await task
        *_, fault, done, rest = caller.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        assert json.loads(fault.removeprefix("data: "))["error"]["code"] == code
        assert "/path" not in fault

    asyncio.run(run())


@pytest.mark.parametrize("stream", [True, False])
def test_a_fault_before_the_first_token_has_its_own_status(serve, stream):
    server = serve()
    silent = with_stream(server)

    async def run():
        caller = Caller(server.app, stream=stream)
        silent.outputs.put_nowait(RequestOutput("x", (), FinishReason.ABORT))
        await caller.start()
        assert caller.status == 503

    asyncio.run(run())


def test_a_reader_that_takes_nothing_is_cut_off(serve):
    server = serve(lambda prompt: (70,) * 4000)
    server.state.stall_seconds = 0.05

    async def run():
        caller = Caller(server.app, stream=True)
        task = caller.start()
        await caller.until(lambda c: len(c.sent) > 2)
        caller.block = asyncio.Event()
        async with asyncio.timeout(20):
            await task
        assert caller.cut
        await idle(server)

    asyncio.run(run())


def test_a_body_that_does_not_come_is_408(serve, monkeypatch):
    import vllm_server.ops.exchange as exchange

    server = serve()
    read = exchange.Exchange.read_body
    monkeypatch.setattr(exchange.Exchange, "read_body", lambda self, limit: read(self, limit, 0.05))

    async def run():
        caller = Caller(server.app)
        caller._asked = True
        await caller.start()
        assert caller.status == 408
        assert json.loads(caller.text)["error"]["code"] == "request_timeout"

    asyncio.run(run())


def test_a_client_chosen_id_in_use_is_409(serve):
    server = serve()
    silent = with_stream(server)

    async def run():
        first = Caller(server.app, request_id="mine", stream=True)
        running = first.start()
        async with asyncio.timeout(20):
            while not server.state.running:
                await asyncio.sleep(0.001)
        second = Caller(server.app, request_id="mine")
        await second.start()
        assert second.status == 409
        assert json.loads(second.text)["error"]["type"] == "conflict_error"
        silent.outputs.put_nowait(RequestOutput("x", (70,), FinishReason.LENGTH))
        await running
        assert server.state.running == set()

    asyncio.run(run())


def test_draining_waits_for_running_answers(serve):
    server = serve(lambda prompt: (70,) * 50, step_seconds=0.001)

    async def run():
        caller = Caller(server.app, stream=True)
        task = caller.start()
        await caller.until(lambda c: len(c.sent) > 1)
        server.state.start_drain()
        assert not await server.state.wait_idle(0)
        assert await server.state.wait_idle(20)
        await task
        assert caller.text.endswith("data: [DONE]\n\n")
        refused = Caller(server.app)
        await refused.start()
        assert refused.status == 503

    asyncio.run(run())


def test_closing_the_engine_ends_streams_with_an_error_event(serve):
    server = serve(lambda prompt: (70,) * 4000, step_seconds=0.001)

    async def run():
        caller = Caller(server.app, stream=True)
        task = caller.start()
        await caller.until(lambda c: len(c.sent) > 2)
        await asyncio.to_thread(server.engine.close)
        async with asyncio.timeout(20):
            await task
        assert '"code":"draining"' in caller.text
        assert caller.text.endswith("data: [DONE]\n\n")

    asyncio.run(run())


def test_a_stop_string_in_a_stream_ends_the_engines_work_too(serve, tokenizer):
    script = (*tokenizer.encode("abc STOP", False), *[70] * 3000)
    server = serve(lambda prompt: script, step_seconds=0.001)

    async def run():
        caller = Caller(server.app, stream=True, stop=["STOP"])
        await caller.start()
        await idle(server)
        assert server.engine.snapshot().generation_tokens < 3000

    asyncio.run(run())


def test_many_streams_at_once_are_all_answered_in_full(serve):
    server = serve("Hello, this is an answer of some length.")

    async def run():
        callers = [Caller(server.app, stream=True) for _ in range(64)]
        await asyncio.gather(*(c.start() for c in callers))
        for caller in callers:
            events = [
                json.loads(e.removeprefix("data: "))
                for e in caller.text.split("\n\n")
                if e and "[DONE]" not in e
            ]
            text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
            assert text == "Hello, this is an answer of some length."

    asyncio.run(run())
