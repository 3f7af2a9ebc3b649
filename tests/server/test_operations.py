"""Models, health, tokenization, documents, shutdown, and what every answer has."""

from __future__ import annotations

import json

import pytest
from vllm_server.config.schema import AuthSettings, ServerSettings, Settings


def test_models_are_listed_by_every_name(serve):
    server = serve()
    body = server.client.get("/v1/models").json()
    assert body["object"] == "list"
    assert [m["id"] for m in body["data"]] == ["tiny", "org/tiny"]
    entry = server.client.get("/v1/models/org/tiny").json()
    assert entry == body["data"][1]
    assert entry["owned_by"] == "vllm-lite"
    assert entry["max_model_len"] == 4096
    assert server.client.get("/v1/models/org%2Ftiny").json() == entry


def test_an_unknown_model_is_404_and_says_what_there_is(serve):
    response = serve().client.get("/v1/models/org/other")
    error = response.json()["error"]
    assert response.status_code == 404
    assert (error["code"], error["type"]) == ("model_not_found", "not_found_error")
    assert "org/tiny" in error["message"]


def test_health_is_503_with_progress_while_loading(serve):
    server = serve(loaded=False)
    server.state.progress = 0.25
    for path in ("/health", "/v1/health", "/health/ready", "/ping"):
        response = server.client.get(path)
        assert response.status_code == 503
        assert response.json()["status"] == "loading"
        assert response.json()["progress"] == 0.25
        assert response.json()["error"]["code"] == "loading"
    assert server.client.get("/health/live").status_code == 200
    chat = server.chat()
    assert (chat.status_code, chat.json()["error"]["code"]) == (503, "loading")
    assert "retry-after" in chat.headers
    assert server.client.get("/v1/models").status_code == 503


def test_health_is_ok_when_ready_and_503_while_draining(serve):
    server = serve()
    assert server.client.get("/health").json() == {"status": "ok"}
    head = server.client.head("/health")
    assert (head.status_code, head.content) == (200, b"")
    server.state.start_drain()
    assert server.client.get("/health").json()["status"] == "draining"
    assert server.chat().json()["error"]["code"] == "draining"


def test_health_tells_an_engine_without_progress(serve):
    from vllm_core import EngineHealth

    server = serve()
    engine = server.state.service.engine
    engine.health = lambda: EngineHealth("ok", 7, 9.9)
    assert server.client.get("/health").status_code == 200
    engine.health = lambda: EngineHealth("ok", 7, 10.1)
    assert server.client.get("/health").json()["status"] == "dead"
    engine.health = lambda: EngineHealth("dead", 7, 0.0, "it failed")
    assert server.client.get("/health").json()["status"] == "dead"
    assert "it failed" not in server.client.get("/health").text
    server.state.mark_dead()
    response = server.chat()
    assert response.json()["error"]["code"] == "engine_unavailable"
    assert response.headers["x-should-retry"] == "false"


def test_load_is_a_number(serve):
    assert serve().client.get("/load").json() == {"server_load": 0}
    assert set(serve().client.get("/version").json()) == {"version"}


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_text_is_tokenized_and_back(serve, tokenizer, prefix):
    client = serve().client
    found = client.post(prefix + "/tokenize", json={"prompt": "é!", "return_token_strs": True})
    ids = tokenizer.encode("é!")
    assert found.json() == {
        "count": 3, "max_model_len": 4096, "tokens": ids, "token_strs": ["\ufffd", "\ufffd", "!"],
    }  # fmt: skip
    back = client.post(prefix + "/detokenize", json={"tokens": ids})
    assert back.json() == {"prompt": "é!"}


def test_a_conversation_is_tokenized_as_chat_would(serve, tokenizer):
    server = serve()
    messages = [{"role": "user", "content": "hi"}]
    found = server.client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    chat = server.chat("hi", return_token_ids=True).json()["prompt_token_ids"]
    assert found == chat
    assert server.client.post("/tokenize", json={"content": "hi"}).json()["count"] == 2


def test_the_api_describes_itself(serve):
    document = serve().client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    paths = document["paths"]
    assert set(paths["/shutdown"]) == {"get", "post"}
    ref = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    name = ref["schema"]["$ref"].rsplit("/", 1)[1]
    assert "messages" in document["components"]["schemas"][name]["required"]
    used = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert used <= set(document["components"]["schemas"])


def test_the_page_for_people_loads_nothing(serve):
    page = serve().client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text and "http" not in page.text.replace("http-", "")
    assert "/v1/chat/completions" in page.text
    assert "guided_json" in page.text and "safety_identifier" in page.text


@pytest.mark.parametrize(
    "path",
    [
        "/", "/v1", "/v2/models", "/v1/chat/completions/", "//v1/models", "/V1/models",
        "/v1%2fmodels", "/v1/%6dodels", "/v1/models/", "/v1/files", "/v1/batches", "/health;x",
        "/health%00", "/v1/../health", "/metrics/", "/%2e%2e/health",
    ],
)  # fmt: skip
def test_no_other_spelling_of_a_path_is_a_route(serve, path):
    import asyncio

    assert asyncio.run(raw_status(serve().app, path)) == (404, "not_found", "not_found_error")


async def raw_status(app, path):
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": "GET", "path": path, "raw_path": path.encode(),
        "headers": [(b"host", b"localhost")], "query_string": b"", "client": ("127.0.0.1", 1),
    }  # fmt: skip
    await app(scope, receive, send)
    error = json.loads(sent[1]["body"])["error"]
    return sent[0]["status"], error["code"], error["type"]


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("PUT", "/v1/models", "GET"),
        ("DELETE", "/v1/models/tiny", "GET"),
        ("POST", "/health", "GET, HEAD"),
        ("OPTIONS", "/v1/completions", "POST"),
        ("TRACE", "/metrics", "GET"),
        ("HEAD", "/shutdown", "GET, POST"),
    ],
)
def test_another_method_is_405_and_says_which_is_right(serve, method, path, allow):
    server = serve()
    response = server.client.request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == allow
    if method != "HEAD":
        assert response.json()["error"]["code"] == "method_not_allowed"
    assert server.shutdowns == []


def test_every_answer_has_the_standard_headers(serve):
    server = serve()
    for response in (server.chat(), server.client.get("/health"), server.client.get("/nope")):
        assert response.headers["server"] == "vllm-lite"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1:2.3_Z", True), ("a b", False), ("a" * 129, False), ("é", False), ("", False)],
)
def test_a_good_request_id_is_kept_and_any_other_replaced(serve, given, kept):
    headers = {"x-request-id": given.encode("latin-1")}
    found = serve().client.get("/health", headers=headers).headers["x-request-id"]
    assert (found == given) == kept
    assert found


def test_two_requests_of_one_header_id_do_not_collide(serve):
    server = serve()
    ids = {
        server.client.post(
            "/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "same"}
        ).json()["id"]
        for _ in range(2)
    }
    assert len(ids) == 2 and all(i.startswith("cmpl-same") for i in ids)


def test_a_body_over_the_limit_is_413(serve):
    server = serve(settings=Settings(server=ServerSettings(max_body_size_mb=0.01)))
    for kwargs in ({"content": b"a" * 20_000}, {"content": iter([b"a" * 8_000] * 3)}):
        response = server.client.post("/v1/completions", **kwargs)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"


def test_a_foreign_host_is_421_where_hosts_are_listed(serve):
    server = serve(settings=Settings(server=ServerSettings(allowed_hosts=("localhost",))))
    assert server.client.get("/health").status_code == 200
    assert server.client.get("/health", headers={"host": "LOCALHOST:80"}).status_code == 200
    for host in ("evil.com", "localhost@evil.com", "evil.com/?localhost", "[::"):
        response = server.client.get("/health", headers={"host": host})
        assert response.status_code == 421
        assert response.json()["error"]["code"] == "misdirected_request"


def test_unknown_names_are_errors_in_strict_mode(serve):
    server = serve(settings=Settings(server=ServerSettings(strict_params=True)))
    response = server.chat(frobnicate=1, user="x")
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unknown_parameter"
    assert response.json()["error"]["param"] == "frobnicate"


def test_pages_of_other_origins_may_call_only_if_configured(serve):
    page = {"origin": "https://app.example"}
    ask = {**page, "access-control-request-method": "POST"}
    closed = serve().client
    assert "access-control-allow-origin" not in closed.get("/health", headers=page).headers
    assert closed.options("/v1/models", headers=ask).status_code == 405
    settings = Settings(
        server=ServerSettings(cors_origins=("https://app.example",)),
        auth=AuthSettings(api_keys=("k",)),
    )
    open_ = serve(settings=settings).client
    answer = open_.get("/health", headers=page)
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    preflight = open_.options("/v1/chat/completions", headers=ask)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-methods"] == "POST"
    other = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert open_.options("/v1/models", headers=other).status_code == 405
    refused = open_.get("/v1/models", headers=page)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example"


def test_shutdown_drains_and_says_so(serve):
    server = serve()
    answer = server.client.post("/shutdown")
    assert answer.status_code == 202
    assert answer.json() == {"status": "shutting_down", "mode": "drain", "timeout_s": 30.0}
    assert server.shutdowns == [("drain", 30.0)]
    assert server.client.get("/health").status_code == 503
    assert server.chat().json()["error"]["code"] == "draining"
    again = server.client.post("/shutdown", json={"mode": "abort", "timeout_s": 0})
    assert again.json()["mode"] == "abort"
    assert server.shutdowns[1] == ("abort", 0)


def test_shutdown_by_get_is_200_and_a_bad_body_does_nothing(serve):
    server = serve()
    for body in ({"mode": "now"}, {"timeout_s": -1}, {"timeout_s": 3601}, {"delay": 1}):
        assert server.client.post("/shutdown", json=body).status_code == 400
    assert server.shutdowns == []
    assert server.client.get("/shutdown").status_code == 200


def test_shutdown_can_be_unmounted(serve):
    for server in (ServerSettings(shutdown_endpoint=False), ServerSettings(hardened=True)):
        assert serve(settings=Settings(server=server)).client.get("/shutdown").status_code == 404


def test_the_access_log_has_one_line_without_the_prompt(serve, caplog):
    server = serve("Hello!")
    with caplog.at_level("INFO", logger="vllm_server"):
        server.chat("a secret prompt")
        server.client.get("/health")
        server.client.get("/metrics")
    lines = [r.getMessage() for r in caplog.records if r.name == "vllm_server.ops.pipeline"]
    assert len(lines) == 1
    assert lines[0].startswith("POST /v1/chat/completions 200 34+7 tokens")
    assert "secret" not in caplog.text
