"""The server on a real socket: raw requests that are not clean, slow ones, and large ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from functools import partial

import pytest
import uvicorn
from vllm_server.config.schema import ServerSettings
from vllm_server.ops.http_protocol import ConnectionLimits, HttpProtocol, uvicorn_config

HOST = b"Host: localhost\r\n"


@contextlib.contextmanager
def listening(app, limits=None, **server):
    """A uvicorn server in a thread; yields its port."""
    config = uvicorn_config(app, ServerSettings(**server))
    if limits is not None:
        config.http = partial(HttpProtocol, limits)
    running = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(
        target=lambda: asyncio.run(running.serve(sockets=[listener])), daemon=True
    )
    running.install_signal_handlers = lambda: None
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        running.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


def ask(port, *pieces, shut=False):
    """Send raw bytes; the whole answer until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as peer:
        with contextlib.suppress(OSError):
            for piece in pieces:
                peer.sendall(piece)
            if shut:
                peer.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while part := peer.recv(65536):
                answer += part
    return answer


def status_of(answer):
    return int(answer.split(b" ", 2)[1])


def error_of(answer):
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


GET = b"GET /health HTTP/1.1\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\n" + HOST
CLOSE = b"Connection: close\r\n\r\n"
UNCLEAN = {
    "two lengths in two ways": POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
    "two lengths": POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    "the same length twice": POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "a negative length": POST + b"Content-Length: -3\r\n\r\n",
    "a wild length": POST + b"Content-Length: 3x\r\n\r\n",
    "no host": GET + b"\r\n",
    "two hosts": GET + HOST + HOST + b"\r\n",
    "a folded field": GET + HOST + b"X-A: b\r\n c\r\n\r\n",
    "bare line feeds": b"GET /health HTTP/1.1\nHost: localhost\n\n",
    "one bare line feed": GET + b"Host: localhost\nX-A: b\r\n\r\n",
    "a NUL": GET + HOST + b"X-A: b\x00c\r\n\r\n",
    "a space before the colon": GET + HOST + b"X-A : b\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a target of another kind": b"GET http://evil.com/health HTTP/1.1\r\n" + HOST + b"\r\n",
    "a star": b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n",
    "a tunnel": b"CONNECT localhost:80 HTTP/1.1\r\n" + HOST + b"\r\n",
    "no protocol": b"GET /health\r\n\r\n",
    "noise": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100,
    "a target beyond ASCII": b"GET /health\xc3\xa9 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a bad chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",
    "fields after the body": (
        POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-Late: 1\r\n\r\n"
    ),
    "an endless chunk extension": (
        POST + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 1_000_000 + b"\r\na\r\n0\r\n\r\n"
    ),
}


@pytest.fixture(scope="module")
def port(tokenizer):
    """One server for all raw requests, which never reach a model."""
    from vllm_server.app import create_app
    from vllm_server.config.schema import Settings
    from vllm_server.service import ServerState

    with listening(create_app(ServerState(Settings()))) as found:
        yield found


@pytest.mark.parametrize("request_", UNCLEAN.values(), ids=UNCLEAN.keys())
def test_an_unclean_request_is_refused_and_the_connection_closed(port, request_):
    answer = ask(port, request_)
    # What is wrong only in the body may be found after the answer that the model is loading.
    assert status_of(answer) in ((400, 503) if b"chunked\r\n\r\n" in request_ else (400,))
    if status_of(answer) == 400:
        assert error_of(answer)["type"] == "invalid_request_error"
    assert status_of(ask(port, GET + HOST + CLOSE)) == 503  # loading, and still answering


def test_the_pieces_of_a_head_may_come_one_by_one(port):
    head = GET + HOST + CLOSE
    answer = ask(port, *(head[i : i + 1] for i in range(len(head))))
    assert status_of(answer) == 503


TOO_LARGE = {
    "one long field": GET + HOST + b"X-A: " + b"a" * 17_000 + b"\r\n\r\n",
    "a long target": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "many fields": GET + HOST + b"X-A: b\r\n" * 100 + b"\r\n",
    "a head without end": GET + HOST + b"X-A: b\r\n" * 1_000_000,
    "one field without end": GET + HOST + b"X-A: " + b"a" * 8_000_000,
}


@pytest.mark.parametrize("request_", TOO_LARGE.values(), ids=TOO_LARGE.keys())
def test_a_head_that_is_too_large_is_431(port, request_):
    answer = ask(port, request_)
    if answer:  # the rest of a large request may break the connection before the answer is read
        assert status_of(answer) == 431
        assert error_of(answer)["code"] == "headers_too_large"
    else:
        assert len(request_) > 100_000


def test_64_fields_and_a_head_below_the_limit_pass(port):
    fields = b"".join(b"X-%d: %s\r\n" % (i, b"a" * 200) for i in range(62))
    assert status_of(ask(port, GET + HOST + fields + CLOSE)) == 503


def test_a_connection_serves_several_requests_one_after_the_other(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as peer:
        for _ in range(3):
            peer.sendall(GET + HOST + b"\r\n")
            answer = b""
            while b'"progress":0.0}' not in answer:
                answer += peer.recv(65536)
            assert status_of(answer) == 503


def test_a_large_declared_body_is_413_before_it_is_sent(serve):
    server = serve()
    with listening(server.app) as port:
        answer = ask(port, POST + b"Content-Length: 10000000000\r\n\r\n")
    assert status_of(answer) == 413
    assert b"connection: close" in answer.lower()


def test_a_head_that_does_not_come_in_time_closes_the_connection(port, serve):
    server = serve()
    with listening(server.app, ConnectionLimits(head_seconds=0.1)) as slow:
        assert ask(slow) == b""
        for request_ in (b"GET /hea", GET + b"Host: loc", b"\r\n"):
            answer = ask(slow, request_)
            assert status_of(answer) == 408
            assert error_of(answer)["type"] == "timeout_error"
        assert status_of(ask(slow, GET + HOST + CLOSE)) == 200


def test_a_body_that_nobody_waits_for_must_end_soon(serve):
    server = serve()
    unknown = b"POST /nope HTTP/1.1\r\n" + HOST + b"Content-Length: 100\r\n\r\n"
    with listening(server.app, ConnectionLimits(head_seconds=0.1)) as port:
        assert status_of(ask(port, unknown)) == 404


def test_a_connection_lives_on_after_a_late_body(serve):
    server = serve()
    unknown = b"POST /nope HTTP/1.1\r\n" + HOST + b"Content-Length: 100\r\n\r\n"
    with (
        listening(server.app) as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as peer,
    ):
        peer.sendall(unknown)
        answer = b""
        while b'"not_found"}}' not in answer:
            answer += peer.recv(65536)
        peer.sendall(b"a" * 100)
        peer.sendall(GET + HOST + b"\r\n")
        assert status_of(peer.recv(65536)) == 200


def test_more_connections_than_allowed_are_answered_with_503(serve):
    server = serve()
    with listening(server.app, max_connections=2) as port, contextlib.ExitStack() as held:
        for _ in range(2):
            peer = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            peer.sendall(GET + HOST + b"\r\n")
            assert peer.recv(65536).startswith(b"HTTP/1.1 200")
        answer = ask(port, GET + HOST + CLOSE)
        assert status_of(answer) == 503
        assert error_of(answer)["code"] == "server_overloaded"


def test_a_root_path_of_a_proxy_is_not_part_of_the_route(serve):
    server = serve()
    with listening(server.app, root_path="/llm") as port:
        assert status_of(ask(port, GET + HOST + CLOSE)) == 200


def test_a_client_that_closes_its_connection_frees_its_blocks(serve):
    server = serve(lambda prompt: (70,) * 4000, step_seconds=0.002)
    body = json.dumps({"prompt": "hi", "max_tokens": 4000, "stream": True}).encode()
    with listening(server.app) as port:
        for reset in (False, True):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as peer:
                if reset:
                    linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                peer.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                answer = b""
                while b"data: " not in answer:
                    answer += peer.recv(65536)
            asyncio.run(server.engine.drain(20))
            assert server.engine.snapshot().num_in_flight == 0
    assert server.engine.snapshot().generation_tokens < 8000


def test_a_reader_that_never_reads_is_cut_off_and_its_blocks_freed(serve):
    server = serve(lambda prompt: (70,) * 250_000, max_model_len=262_144)
    server.state.stall_seconds = 0.2
    body = json.dumps({"prompt": "hi", "max_tokens": 250_000, "stream": True, "logprobs": 5})
    with (
        listening(server.app) as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as peer,
    ):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body.encode())
        assert peer.recv(1)
        assert asyncio.run(server.engine.drain(30))
    assert server.engine.snapshot().generation_tokens < 250_000
