"""A tiny byte-level tokenizer, and a server over a backend that answers with prepared tokens."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from starlette.testclient import TestClient
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from vllm_core import AsyncEngine, EngineStats, SchedulerConfig
from vllm_core.testing import FakeBackend
from vllm_core.testing.fake import INFO
from vllm_server import logs
from vllm_server.app import create_app
from vllm_server.config.schema import SamplingSettings, Settings
from vllm_server.service import ModelCard, ServerState, Service
from vllm_server.text.tokenizer import Tokenizer as TextTokenizer

# A busy machine is no finding.
hypothesis.settings.register_profile(
    "server", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("server")


@pytest.fixture
def restored_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands configure the process; a test gives everything back."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    for name in logs._OURS:
        logging.getLogger(name).setLevel(logging.NOTSET)


SPECIALS = ["<|end|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking %}{{ '<think>\n' }}{% endif %}"
    "{% endif %}{# </think> #}"
)


def build_tokenizer(folder: Path, template: str = CHATML) -> Path:
    """Ids 0-2 are special, 3 and 4 the reasoning markers, then one id for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIALS, "<think>", "</think>", *alphabet]
    source = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    source.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    source.decoder = decoders.ByteLevel()
    source.add_special_tokens([AddedToken(word, special=True) for word in SPECIALS])
    source.add_tokens([AddedToken(word, special=False) for word in ("<think>", "</think>")])
    source.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> TextTokenizer:
    return TextTokenizer(tokenizer_folder)


@dataclass
class Harness:
    """A server without a socket."""

    state: ServerState
    engine: AsyncEngine
    backend: FakeBackend
    app: Any
    client: TestClient
    shutdowns: list[tuple[str, float]] = field(default_factory=list)

    def chat(self, text: str = "hi", **more: Any) -> Any:
        body = {"messages": [{"role": "user", "content": text}], **more}
        return self.client.post("/v1/chat/completions", json=body)

    def complete(self, prompt: Any = "hi", **more: Any) -> Any:
        return self.client.post("/v1/completions", json={"prompt": prompt, **more})

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """Payloads of a stream, the end mark as text."""
        response = self.client.post(path, json={**body, "stream": True})
        assert response.status_code == 200, response.text
        blocks = [b for b in response.text.split("\n\n") if b and not b.startswith(":")]
        assert blocks[-1] == "data: [DONE]"
        return [json.loads(b.removeprefix("data: ")) for b in blocks[:-1]]

    def stream_chat(self, text: str = "hi", **more: Any) -> list[Any]:
        body = {"messages": [{"role": "user", "content": text}], **more}
        return self.events("/v1/chat/completions", body)


Make = Callable[..., Harness]


def settled(engine: AsyncEngine) -> EngineStats:
    """The engine's numbers once the last batch in flight has been read."""
    deadline = time.monotonic() + 10
    stats = engine.snapshot()
    while stats.kv_usage and not stats.sessions and time.monotonic() < deadline:
        if engine.health().status == "dead":
            break
        time.sleep(0.001)
        stats = engine.snapshot()
    return stats


def card_of(backend: FakeBackend, **changed: Any) -> ModelCard:
    """What the API says of a model called `tiny`."""
    card = {
        "names": ("tiny", "org/tiny"),
        "root": "tiny",
        "max_model_len": backend.info.max_model_len,
        "vocab_size": backend.info.vocab_size,
        "fingerprint": "vllm-lite-0.1.0-00000000",
        "hidden_size": 8,
    }
    return ModelCard(**(card | changed))


def end(server: Harness) -> None:
    """Close a server, in which nothing may be left running."""
    is_closed = server.engine.health().status == "dead"
    assert asyncio.run(server.engine.drain(10)), "a request is still running"
    stats = settled(server.engine)
    server.engine.close()
    server.state.close()
    assert (stats.num_in_flight, server.state.num_open, server.state.num_streams) == (0, 0, 0)
    assert stats.kv_usage == 0.0 or stats.sessions or is_closed, "blocks are still held"
    assert server.state.running == set()


@pytest.fixture
def serve(tokenizer: TextTokenizer) -> Iterator[Make]:
    """Builds servers; after the test nothing may be left running in any of them."""
    made: list[Harness] = []

    def make(
        answer: str | Callable[[tuple[int, ...]], tuple[int, ...]] = "Hello!",
        settings: Settings | None = None,
        text: TextTokenizer | None = None,
        clock: Callable[[], float] | None = None,
        scheduler: SchedulerConfig | None = None,
        client: tuple[str, int] = ("127.0.0.1", 50000),
        loaded: bool = True,
        defaults: SamplingSettings | None = None,
        step_seconds: float = 0.0,
        card: dict[str, Any] | None = None,
        **info: Any,
    ) -> Harness:
        text = text or tokenizer
        script = text.encode(answer, False) if isinstance(answer, str) else None
        reply = answer if script is None else lambda prompt: tuple(script)
        backend = FakeBackend(reply, replace(INFO, **info), step_seconds=step_seconds, record=True)
        engine = AsyncEngine(backend, scheduler or SchedulerConfig())
        engine.start()
        shutdowns: list[tuple[str, float]] = []
        more = {} if clock is None else {"clock": clock}
        state = ServerState(
            settings or Settings(), lambda mode, s: shutdowns.append((mode, s)), **more
        )
        if loaded:
            shown = card_of(backend, **(card or {}))
            state.complete(Service(engine, text, shown, defaults or SamplingSettings()))
        app = create_app(state)
        client_ = TestClient(
            app, base_url="http://localhost", client=client, raise_server_exceptions=True
        )
        made.append(Harness(state, engine, backend, app, client_, shutdowns))
        return made[-1]

    yield make
    for each in made:
        end(each)
