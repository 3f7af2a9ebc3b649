"""What a loaded model proves about itself, and where it is told."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from vllm_core.testing import FakeBackend
from vllm_core.testing.fake import INFO
from vllm_models.measure import KernelSpeed
from vllm_models.native.library import library
from vllm_models.options import LoadProgress
from vllm_server import launch
from vllm_server.config import load
from vllm_server.config.flags import FlagParser
from vllm_server.self_check import Findings, SelfCheck, examine, results_of_every_way
from vllm_traits import BackendInfo, Batch, BatchOutput, ConfigError, DeviceError, Done

ALL = ("beside another", "in a batch of 7", "in chunks", "after a prefix hit")
PROGRAM = str(Path(sys.executable).with_name("vllm-lite"))


@dataclass
class Loaded:
    batch_dependence: tuple[str, ...] = ()


class Moody(FakeBackend):
    """Log-probabilities change by one bit in the steps that a rule picks."""

    def __init__(self, rule: Any = lambda batch: False, info: BackendInfo = INFO, **more: Any):
        super().__init__(lambda prompt: (5, 6, 7, 8), info)
        self.rule = rule
        self.loaded = Loaded(**more)
        self.speed: KernelSpeed | None = None
        self.released: set[int] = set()
        self.started: set[int] = set()

    def forward(self, batch: Batch) -> Any:
        self.started |= {start.seq_id for start in batch.starts}
        self.released |= set(batch.released)
        in_flight = super().forward(batch)
        in_flight.sample({})
        output = in_flight.result()
        return Done(self._change(output) if self.rule(batch) else output)

    def _change(self, output: BatchOutput) -> BatchOutput:
        changed = {
            i: tuple(entry._replace(logprob=-0.5000000000000001) for entry in entries)
            for i, entries in output.logprobs.items()
        }
        return replace(output, logprobs=changed)

    def measure_kernels(self) -> KernelSpeed | None:
        return self.speed


def check(backend: Any, require: bool = False) -> Findings:
    return examine(backend, True, require, lambda news: None)


def test_a_backend_without_moods_passes_and_every_row_is_released() -> None:
    backend = Moody()
    findings = check(backend)
    assert findings.deterministic
    assert findings.self_check is not None
    assert findings.self_check.ways == ALL
    assert backend.started == backend.released


@pytest.mark.parametrize(
    ("rule", "differences"),
    [
        (lambda batch: len(batch.chunks) in (2, 3), ("beside another",)),
        (lambda batch: len(batch.chunks) > 4, ("in a batch of 7",)),
        (lambda batch: any(c.start == 32 and c.num_tokens > 1 for c in batch.chunks), ALL[2:]),
    ],
    ids=["a few rows", "many rows", "late chunks"],
)
def test_a_single_bit_that_depends_on_the_batch_is_found(rule: Any, differences: Any) -> None:
    findings = check(Moody(rule))
    assert findings.self_check is not None
    assert findings.self_check.differences == differences
    assert not findings.deterministic
    assert findings.reasons == tuple(f"they differ {way}" for way in differences)


def test_what_the_backend_knows_needs_no_run() -> None:
    backend = Moody(batch_dependence=("attention runs in torch",))
    findings = examine(backend, False, False, lambda news: None)
    assert findings.reasons == ("attention runs in torch",)
    assert findings.self_check is None
    assert not backend.started


def test_determinism_that_is_required_and_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"attention runs in torch\. Change what is"):
        check(Moody(batch_dependence=("attention runs in torch",)), require=True)
    with pytest.raises(DeviceError, match="several ways, and they differ in a batch of 7"):
        check(Moody(lambda batch: len(batch.chunks) > 4), require=True)
    assert check(Moody(), require=True).deterministic


@pytest.mark.parametrize(
    ("limits", "ways"),
    [
        ({"max_sequences": 1}, ALL[2:]),
        ({"num_blocks": 8}, ("in a batch of 2", *ALL[2:])),
        ({"max_model_len": 20}, ALL[:2]),
        ({"prefix_cacheable": False}, ALL[:3]),
        ({"num_blocks": 1, "max_model_len": 16}, ()),
    ],
)
def test_ways_that_do_not_fit_are_left_out(limits: dict[str, Any], ways: tuple[str, ...]) -> None:
    found = results_of_every_way(Moody(info=replace(INFO, **limits)))
    assert tuple(found) == ("alone", *ways)


def test_a_request_that_fails_is_no_success() -> None:
    class Broken(Moody):
        def _change(self, output: BatchOutput) -> BatchOutput:
            return BatchOutput({}, failed=dict.fromkeys(output.token_ids, "non_finite"))

    with pytest.raises(DeviceError, match="cannot run: a request ended with non_finite"):
        check(Broken(lambda batch: True))


def test_the_start_is_told_that_the_check_runs() -> None:
    told: list[LoadProgress] = []
    examine(Moody(), True, False, told.append)
    assert [(news.stage, news.fraction) for news in told] == [("self-check", 0), ("self-check", 1)]


PASSED = Findings((), SelfCheck((), ALL, 70e9, {"dense": 0.875, "decode_step": 0.5}, 0.25))
FAILED = Findings((), SelfCheck(ALL[:1], ALL, None, {}, 0.25))


def test_the_lines_of_the_start_have_the_verdict_and_the_shares() -> None:
    told = "\n".join(PASSED.lines())
    assert "Results do not depend on the batch" in told
    assert "passed in 0.25 s" in told
    assert "memory reads 70.0 GB/s, of which dense 88%, decode_step 50%" in told
    told = "\n".join(FAILED.lines())
    assert "may depend on the batch: they differ beside another" in told
    assert "Self-check: failed" in told


def test_health_and_metrics_tell_what_was_found(serve: Any) -> None:
    server = serve()
    assert server.client.get("/health").json() == {"status": "ok"}
    assert "vllm_lite:deterministic" not in server.client.get("/metrics").text
    server.state.service = replace(server.state.service, findings=PASSED)
    health = server.client.get("/health").json()
    assert health["status"] == "ok"
    assert health["deterministic"] is True
    assert health["self_check"]["passed"] is True
    assert health["self_check"]["read_bandwidth_gb_per_s"] == 70.0
    text = server.client.get("/metrics").text
    labels = 'engine="0",'
    assert f"vllm_lite:deterministic{{{labels}" in text
    assert f'vllm_lite:kernel_bandwidth_share{{{labels}kernel="dense"' in text
    assert "vllm_lite:read_bandwidth_bytes_per_second" in text
    server.state.service = replace(server.state.service, findings=FAILED)
    health = server.client.get("/health").json()
    assert health["deterministic"] is False
    assert health["reasons"] == ["they differ beside another"]
    assert "kernel_bandwidth_share" not in server.client.get("/metrics").text


def test_a_real_model_passes_where_it_has_kernels() -> None:
    words = (
        "--self-check",
        "--num-kv-blocks",
        "64",
        "--max-model-len",
        "256",
        "--num-threads",
        "1",
    )
    settings = load(FlagParser("serve", "").parse([*words, "--device", "cpu"])[1], environ={})
    findings = launch.load_model(settings.settings, lambda news: None).findings
    check = findings.self_check
    assert check is not None
    assert check.ways == ALL
    if library() is None:
        assert "no native kernels" in findings.reasons[0]
    else:
        assert findings.deterministic
        assert check.read_bandwidth is not None
        assert set(check.shares) == {"dense", "decode_step"}


def test_a_start_that_cannot_be_deterministic_ends_with_code_2() -> None:
    words = (
        *("completion", "--prompts", "hi", "--deterministic", "--dtype", "f16"),
        *("--num-kv-blocks", "64", "--max-model-len", "256", "--device", "cpu"),
    )
    done = subprocess.run([PROGRAM, *words], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    assert "engine.deterministic cannot be kept" in done.stderr
    assert "products run in torch" in done.stderr
