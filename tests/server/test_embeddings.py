"""`/v1/embeddings`."""

from __future__ import annotations

import base64
import struct

import pytest
from vllm_server.config.schema import ServerSettings, Settings


def embed(server, value, **more):
    return server.client.post("/v1/embeddings", json={"input": value, **more})


def test_every_input_gets_its_vector_in_order(serve, tokenizer):
    server = serve()
    body = embed(server, ["ab", tokenizer.encode("ab", False), "c"]).json()
    assert body["object"] == "list"
    assert body["model"] == "tiny"
    assert [d["index"] for d in body["data"]] == [0, 1, 2]
    assert all(d["object"] == "embedding" and len(d["embedding"]) == 8 for d in body["data"])
    assert body["data"][0]["embedding"] == body["data"][1]["embedding"]
    assert body["data"][0]["embedding"] != body["data"][2]["embedding"]
    assert body["usage"] == {"prompt_tokens": 5, "total_tokens": 5}


def test_base64_holds_little_endian_floats(serve):
    server = serve()
    plain = embed(server, "abc").json()["data"][0]["embedding"]
    coded = embed(server, "abc", encoding_format="base64").json()["data"][0]["embedding"]
    assert struct.unpack("<8f", base64.b64decode(coded)) == pytest.approx(plain)


def test_vectors_have_length_one_unless_told_otherwise(serve):
    server = serve()
    unit = embed(server, "aab").json()["data"][0]["embedding"]
    raw = embed(server, "aab", normalize=False).json()["data"][0]["embedding"]
    assert sum(x * x for x in unit) == pytest.approx(1.0)
    assert sum(raw) == 3


def test_dimensions_are_for_models_that_allow_them(serve):
    assert embed(serve(), "a", dimensions=8).status_code == 200
    server = serve(card={"allows_dimensions": True})
    assert len(embed(server, "a", dimensions=4).json()["data"][0]["embedding"]) == 4
    assert embed(server, "a", dimensions=9).json()["error"]["param"] == "dimensions"


def test_a_long_input_is_refused_unless_it_may_be_cut(serve):
    server = serve(max_model_len=32)
    error = embed(server, "a" * 40).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "too large" in error["message"]
    body = embed(server, "a" * 40, truncate_prompt_tokens=-1).json()
    assert body["usage"]["prompt_tokens"] == 32


def test_embeddings_can_be_switched_off(serve):
    response = embed(serve(settings=Settings(server=ServerSettings(embeddings=False))), "a")
    assert response.status_code == 501
    assert response.json()["error"]["type"] == "not_supported_error"
    assert response.headers["x-should-retry"] == "false"


def test_many_inputs_are_refused_all_together_when_the_queue_is_full(serve):
    from vllm_core import SchedulerConfig

    server = serve(scheduler=SchedulerConfig(max_waiting=1), step_seconds=0.01)
    response = embed(server, ["a"] * 200)
    assert response.status_code in (200, 503)
    if response.status_code == 503:
        assert response.json()["error"]["code"] == "server_overloaded"
