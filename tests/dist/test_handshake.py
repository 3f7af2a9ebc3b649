"""Who knows the secret gets in; everybody else loses one connection and learns nothing."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial

import pytest
from vllm_dist import Channel, Role, accept_channel, connect_channel, handshake
from vllm_traits import BackendError, ConfigError, WireError
from vllm_traits.wire import Kind, decode_blob, encode_blob

SECRET = b"0123456789abcdef0123456789abcdef"
OTHER = b"fedcba9876543210fedcba9876543210"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    left, right = (Channel(each) for each in socket.socketpair())
    with closing(left), closing(right):
        yield left, right


def serving(pool: ThreadPoolExecutor, channel: Channel) -> Future[None]:
    """A server that closes the channel if it refuses."""

    def serve() -> None:
        try:
            handshake(channel, SECRET, Role.SERVER)
        except WireError:
            channel.close()
            raise

    return pool.submit(serve)


@contextmanager
def impostor(pool: ThreadPoolExecutor, pair: tuple[Channel, Channel]) -> Iterator[Channel]:
    """Has read the client's hello and said a server's; the client must not believe what follows."""
    client, server = pair
    shaken = pool.submit(handshake, client, SECRET, Role.CLIENT)
    server.receive(5)
    server.send(encode_blob(Kind.HELLO, bytes([Role.SERVER]) + b"n" * 32))
    yield server
    with pytest.raises(WireError, match="does not know the secret"):
        shaken.result()


def test_two_sides_with_one_secret_may_talk(
    pool: ThreadPoolExecutor, pair: tuple[Channel, Channel]
) -> None:
    client, server = pair
    served = serving(pool, server)
    handshake(client, SECRET, Role.CLIENT)
    served.result()
    client.send(encode_blob(Kind.HELLO, b"afterwards"))
    assert decode_blob(server.receive(5), Kind.HELLO) == b"afterwards"


def test_a_client_with_another_secret_is_refused_and_gets_no_proof(
    pool: ThreadPoolExecutor, pair: tuple[Channel, Channel]
) -> None:
    client, server = pair
    served = serving(pool, server)
    with pytest.raises(BackendError):
        handshake(client, OTHER, Role.CLIENT)
    with pytest.raises(WireError, match="does not know the secret"):
        served.result()


def test_a_server_that_does_not_know_the_secret_is_refused(
    pool: ThreadPoolExecutor, pair: tuple[Channel, Channel]
) -> None:
    with impostor(pool, pair) as server:
        server.receive(5)
        server.send(encode_blob(Kind.PROOF, b"p" * 32))


def test_a_recorded_client_is_refused(pool: ThreadPoolExecutor) -> None:
    """Its proof was for another nonce of the server."""
    recorded: list[bytes] = []
    for replay in (False, True):
        left, right = (Channel(each) for each in socket.socketpair())
        with closing(left), closing(right):
            served = serving(pool, right)
            if not replay:
                send = left.send
                left.send = lambda frame, send=send: (recorded.append(frame), send(frame))[1]
                handshake(left, SECRET, Role.CLIENT)
                served.result()
                continue
            for frame in recorded:
                left.send(frame)
            with pytest.raises(WireError, match="does not know the secret"):
                served.result()
    assert len(recorded) == 2


def test_a_server_does_not_answer_its_own_reflection(
    pool: ThreadPoolExecutor, pair: tuple[Channel, Channel]
) -> None:
    """A client that is sent its own frames back must not take them for a server's."""
    client, server = pair
    shaken = pool.submit(handshake, client, SECRET, Role.CLIENT)
    server.send(server.receive(5))
    with pytest.raises(WireError, match="wrong role"):
        shaken.result()


def test_a_server_cannot_use_the_proof_of_its_client(
    pool: ThreadPoolExecutor, pair: tuple[Channel, Channel]
) -> None:
    """A proof holds for one role, though both sides have signed the same nonces."""
    with impostor(pool, pair) as server:
        server.send(server.receive(5))


@pytest.mark.parametrize("length", [0, 1, 19, 20, 30, 56])
def test_a_hello_cut_short_is_refused(
    length: int, pool: ThreadPoolExecutor, pair: tuple[Channel, Channel]
) -> None:
    client, server = pair
    served = serving(pool, server)
    hello = encode_blob(Kind.HELLO, bytes([Role.CLIENT]) + b"n" * 32)
    assert len(hello) == 57
    client.send(hello[:length])
    client.close()
    with pytest.raises(WireError if length else BackendError):
        served.result()


def test_a_silent_client_is_given_up(pair: tuple[Channel, Channel]) -> None:
    with pytest.raises(BackendError, match="timed out"):
        handshake(pair[1], SECRET, Role.SERVER, timeout_s=0.05)


def test_a_short_secret_is_no_secret(pair: tuple[Channel, Channel]) -> None:
    with pytest.raises(ConfigError, match="at least 16 bytes"):
        handshake(pair[0], b"password", Role.CLIENT)


STRANGERS = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: scan\r\n\r\n",
    "tls": bytes.fromhex("16030100c8010000c40303") + b"\x5a" * 200,
    "four gigabytes": struct.pack("<4sHHqI", b"VLLW", 1, Kind.HELLO, 0, 2**32 - 1) + b"x" * 100,
    "a long hello": encode_blob(Kind.HELLO, b"n" * 100),
    "a batch at once": struct.pack("<4sHHqI", b"VLLW", 1, Kind.BATCH, 1, 0) + b"\x00" * 20,
    "zeros": b"\x00" * 4096,
}


def test_strangers_lose_their_own_connection_only(pool: ThreadPoolExecutor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted = pool.submit(accept_channel, listener, SECRET)
        connect = partial(socket.create_connection, listener.getsockname(), 20)
        for blob in STRANGERS.values():
            with connect() as stranger:
                stranger.sendall(blob)
                assert ended(stranger)
        with pytest.raises((BackendError, WireError)):
            connect_channel(listener.getsockname(), OTHER)
        with (
            closing(connect_channel(listener.getsockname(), SECRET)) as client,
            closing(accepted.result(20)) as server,
        ):
            server.send(encode_blob(Kind.HELLO, b"welcome"))
            assert decode_blob(client.receive(5), Kind.HELLO) == b"welcome"


def ended(stranger: socket.socket) -> bool:
    """Whether the other side hung up without a word."""
    try:
        return stranger.recv(1) == b""
    except ConnectionResetError:
        return True
