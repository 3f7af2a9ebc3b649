"""Who may call what: every route with every credential, keys, the guard of /shutdown."""

from __future__ import annotations

import hashlib

import pytest
from vllm_server.app import create_app
from vllm_server.config.schema import AuthSettings, ServerSettings, Settings
from vllm_server.ops.auth import KeyRing, is_local
from vllm_server.service import ServerState
from vllm_traits import ConfigError

KEYS = AuthSettings(
    api_keys=("user-key", {"name": "scraper", "key": "metrics-key", "scopes": ["metrics"]}),
    admin_keys=("admin-key",),
    rate_limit_requests=0,
)
OPEN = AuthSettings()
CALLERS = ("nobody", "wrong", "user", "scraper", "admin")
SECRETS = {
    "nobody": None,
    "wrong": "nope",
    "user": "user-key",
    "scraper": "metrics-key",
    "admin": "admin-key",
}
# For each scope, what a server with keys answers each caller: through, 401 or 403.
EXPECTED = {
    "public": dict.fromkeys(CALLERS, 0),
    "key": {"nobody": 401, "wrong": 401, "user": 0, "scraper": 403, "admin": 0},
    "metrics": {"nobody": 401, "wrong": 401, "user": 0, "scraper": 0, "admin": 0},
    "admin": {"nobody": 401, "wrong": 401, "user": 403, "scraper": 403, "admin": 0},
}
DECLARED = {
    "/v1/chat/completions": "key", "/v1/completions": "key", "/v1/embeddings": "key",
    "/tokenize": "key", "/v1/tokenize": "key", "/detokenize": "key", "/v1/detokenize": "key",
    "/v1/models": "key", "/v1/models/{id}": "key", "/load": "key", "/openapi.json": "key",
    "/docs": "key", "/health": "public", "/v1/health": "public", "/health/live": "public",
    "/health/ready": "public", "/ping": "public", "/version": "public", "/metrics": "metrics",
    "/shutdown": "admin",
}  # fmt: skip


def headers(caller, style="bearer"):
    secret = SECRETS[caller]
    if secret is None:
        return {}
    return {"x-api-key": secret} if style == "x" else {"authorization": f"Bearer {secret}"}


def routes():
    return create_app(ServerState(Settings())).table.routes


def test_the_route_table_is_the_declared_one():
    assert {r.path: r.scope for r in routes()} == DECLARED


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("style", ["bearer", "x"])
def test_every_route_answers_every_caller_as_its_scope_says(serve, caller, style):
    server = serve(settings=Settings(auth=KEYS), client=("203.0.113.7", 1))
    for route in routes():
        for method in route.methods:
            path = route.path.replace("{id}", "tiny")
            answer = server.client.request(method, path, headers=headers(caller, style))
            expected = EXPECTED[route.scope][caller]
            where = f"{method} {path} by {caller}"
            if not expected:
                assert answer.status_code not in (401, 403, 404, 405), where
                server.state.phase = "ready"
                continue
            assert answer.status_code == expected, where
            if method == "HEAD":
                continue
            kind = "authentication_error" if expected == 401 else "permission_error"
            assert answer.json()["error"]["type"] == kind
            if expected == 401:
                assert answer.headers["www-authenticate"] == "Bearer"


def test_without_keys_every_value_is_accepted_and_admin_routes_stay_guarded(serve):
    server = serve(client=("203.0.113.7", 1))
    for caller in CALLERS:
        for route in routes():
            path = route.path.replace("{id}", "tiny")
            answer = server.client.request(route.methods[0], path, headers=headers(caller))
            assert (answer.status_code == 403) == (route.scope == "admin"), path
    assert server.shutdowns == []


def test_metrics_can_be_made_public(serve):
    settings = Settings(auth=KEYS, server=ServerSettings(metrics_public=True))
    assert serve(settings=settings).client.get("/metrics").status_code == 200


def test_a_hardened_server_shows_documents_and_metrics_with_a_key_only(serve):
    client = serve(settings=Settings(server=ServerSettings(hardened=True))).client
    for path in ("/metrics", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 401
    assert client.get("/v1/models").status_code == 200


def test_two_different_keys_are_401_and_the_same_one_twice_is_fine(serve):
    client = serve(settings=Settings(auth=KEYS)).client
    both = {"authorization": "Bearer user-key", "x-api-key": "admin-key"}
    assert client.get("/v1/models", headers=both).status_code == 401
    same = {"authorization": "bearer user-key", "x-api-key": "user-key"}
    assert client.get("/v1/models", headers=same).status_code == 200


@pytest.mark.parametrize(
    "value",
    ["Bearer", "Bearer ", "Basic user-key", "user-key", "Bearer user-key2", "Bearer USER-KEY"],
)
def test_what_is_not_quite_a_key_is_401(serve, value):
    client = serve(settings=Settings(auth=KEYS)).client
    assert client.get("/v1/models", headers={"authorization": value}).status_code == 401


def test_keys_may_be_given_as_digests_and_in_a_file_that_is_read_again(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# people\nfirst-key\n\n  second-key  \n")
    digest = hashlib.sha256(b"third-key").hexdigest()
    ring = KeyRing(AuthSettings(api_keys=(f"sha256:{digest}",), api_keys_file=str(path)))
    assert all(ring.find(k) for k in ("first-key", "second-key", "third-key"))
    assert ring.find("# people") is None
    assert ring.find(digest) is None
    path.write_text("new-key\n")
    ring.reload()
    assert ring.find("new-key") and ring.find("first-key") is None
    path.unlink()
    with pytest.raises(ConfigError, match="keys"):
        ring.reload()
    assert ring.find("new-key"), "a failed reload must keep the keys in use"


@pytest.mark.parametrize(
    "key",
    [
        "", " ", "sha256:12", {"key": 1}, {"key": "secret", "scopes": ["root"]},
        {"key": "secret", "limits": {"speed": 1}}, {"key": "secret", "limits": 5},
        {"key": "secret", "limits": {"rate_limit_requests": "many"}},
    ],
)  # fmt: skip
def test_a_malformed_key_is_a_configuration_error_that_shows_no_key(key):
    with pytest.raises(ConfigError) as caught:
        KeyRing(AuthSettings(api_keys=(key,)))
    assert "secret" not in str(caught.value)


def test_a_hardened_server_refuses_short_keys():
    with pytest.raises(ConfigError, match="16"):
        KeyRing(AuthSettings(api_keys=("short",)), hardened=True)


LOCAL = [(b"host", b"localhost:8000")]


@pytest.mark.parametrize(
    ("peer", "more", "expected"),
    [
        ("127.0.0.1", [], True),
        ("127.9.9.9", [], True),
        ("::1", [], True),
        ("::ffff:127.0.0.1", [], True),
        (None, [], True),
        ("10.0.0.1", [], False),
        ("testclient", [], False),
        ("127.0.0.1", [(b"x-forwarded-for", b"1.2.3.4")], False),
        ("127.0.0.1", [(b"forwarded", b"for=1.2.3.4")], False),
        ("127.0.0.1", [(b"x-real-ip", b"1.2.3.4")], False),
        ("127.0.0.1", [(b"via", b"1.1 proxy")], False),
        ("127.0.0.1", [(b"origin", b"http://evil.com")], False),
        ("127.0.0.1", [(b"origin", b"null")], False),
        ("127.0.0.1", [(b"origin", b"http://localhost:8000")], True),
        ("127.0.0.1", [(b"origin", b"http://localhost:9000")], False),
        ("127.0.0.1", [(b"sec-fetch-site", b"none")], True),
        ("127.0.0.1", [(b"sec-fetch-site", b"same-origin")], True),
        ("127.0.0.1", [(b"sec-fetch-site", b"cross-site")], False),
        ("127.0.0.1", [(b"sec-purpose", b"prefetch")], False),
        ("127.0.0.1", [(b"x-moz", b"prefetch")], False),
    ],
)
def test_a_call_is_local_only_if_nothing_speaks_against_it(peer, more, expected):
    assert is_local(peer, [*LOCAL, *more]) is expected


@pytest.mark.parametrize("host", [b"evil.com", b"127.0.0.1.evil.com", b"", b"[::", b"10.0.0.1"])
def test_a_foreign_host_is_not_local(host):
    assert not is_local("127.0.0.1", [(b"host", host)])


@pytest.mark.parametrize("host", [b"localhost", b"127.0.0.1:80", b"[::1]:8000", b"LOCALHOST"])
def test_names_of_this_machine_are_local(host):
    assert is_local("127.0.0.1", [(b"host", host)])


SHUTDOWN = [
    # keys, caller, is on this machine, status
    (OPEN, "nobody", True, 202),
    (OPEN, "nobody", False, 403),
    (KEYS, "nobody", True, 401),
    (KEYS, "user", True, 403),
    (KEYS, "admin", False, 202),
    (AuthSettings(api_keys=("user-key",)), "user", True, 202),
    (AuthSettings(api_keys=("user-key",)), "user", False, 403),
    (AuthSettings(api_keys=("user-key",)), "nobody", True, 401),
]


@pytest.mark.parametrize(("auth", "caller", "is_here", "status"), SHUTDOWN)
def test_shutdown_is_for_admins_and_this_machine(serve, auth, caller, is_here, status):
    peer = ("127.0.0.1" if is_here else "203.0.113.7", 1)
    server = serve(settings=Settings(auth=auth), client=peer)
    assert server.client.post("/shutdown", headers=headers(caller)).status_code == status
    assert bool(server.shutdowns) == (status == 202)


def test_no_page_of_another_origin_can_shut_down_even_with_a_key(serve):
    server = serve(settings=Settings(auth=KEYS))
    page = {**headers("admin"), "origin": "http://evil.com"}
    assert server.client.post("/shutdown", headers=page).status_code == 403
    for method in ("HEAD", "OPTIONS"):
        assert server.client.request(method, "/shutdown").status_code == 405
    assert server.shutdowns == []


def test_prefixes_are_shared_within_a_key_only(serve):
    auth = AuthSettings(api_keys=("user-key", "other-key"), rate_limit_requests=0)
    server = serve(settings=Settings(auth=auth))

    def cached(key):
        answer = server.client.post(
            "/v1/completions",
            json={"prompt": "x" * 64, "max_tokens": 1},
            headers={"authorization": f"Bearer {key}"},
        )
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("user-key") == 0
    assert cached("user-key") > 0
    assert cached("other-key") == 0


def test_salts_follow_the_trust_between_callers():
    from vllm_server.config.schema import EngineSettings
    from vllm_server.ops.auth import ANYBODY, Identity

    one, two = Identity("a", b"1" * 32), Identity("b", b"2" * 32)
    state = ServerState(Settings())
    assert state.salt(ANYBODY, None) == state.salt(ANYBODY, None)
    assert state.salt(ANYBODY, None) != ServerState(Settings()).salt(ANYBODY, None)
    assert state.salt(one, None) != state.salt(two, None)
    assert state.salt(one, "s") != state.salt(one, None)
    shared = ServerState(Settings(engine=EngineSettings(share_prefix_cache=True)))
    assert shared.salt(one, None) == shared.salt(two, None)
    assert state.session(one, "s") != state.session(two, "s")
