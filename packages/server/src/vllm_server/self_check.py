"""What a loaded model proves about itself before it serves: that results do not depend on the
batch, and how close its kernels come to the memory's limit.

The check runs real requests through an engine of its own; the model's rows are free afterwards.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_core import Engine, SchedulerConfig
from vllm_models.options import LoadProgress, OnProgress
from vllm_traits import (
    BackendInfo,
    Batch,
    ConfigError,
    DeviceError,
    ModelBackend,
    Request,
    SamplingParams,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from vllm_models import TorchBackend

log = logging.getLogger(__name__)

_COMPANY = 6  # requests beside the one that is checked
_NUM_TOKENS = 4
_DECODE_STEPS = 8
_NUM_LOGPROBS = 2

Result = tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What a run has shown.

    Attributes:
        differences: Ways to run a request that changed its tokens or log-probabilities.
        ways: All ways that were tried.
        read_bandwidth: Bytes/s of memory reads; None where torch computes.
        shares: Of that bandwidth, by kernel; above 1 if the weights stay in caches.
        seconds: What the check took.
    """

    differences: tuple[str, ...]
    ways: tuple[str, ...]
    read_bandwidth: float | None
    shares: Mapping[str, float]
    seconds: float


@dataclass(frozen=True, slots=True)
class Findings:
    """What is known about the results of a loaded model.

    Attributes:
        batch_dependence: Why they may depend on the batch, as far as the backend knows.
        self_check: What a run has shown, if one was asked for.
    """

    batch_dependence: tuple[str, ...] = ()
    self_check: SelfCheck | None = None

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why results may depend on the batch; nothing if they do not."""
        differences = self.self_check.differences if self.self_check else ()
        return (*self.batch_dependence, *(f"they differ {way}" for way in differences))

    @property
    def deterministic(self) -> bool:
        """Whether a request gives the same bits in every batch."""
        return not self.reasons

    def lines(self) -> Iterator[str]:
        """For people, at the start."""
        if self.deterministic:
            yield "Results do not depend on the batch: every sum has a fixed order"
        else:
            yield f"Results may depend on the batch: {'; '.join(self.reasons)}"
        if self.self_check is not None:
            yield _line(self.self_check)

    def log(self) -> None:
        """Tell whoever asked for a self-check, where no banner does."""
        for line in self.lines() if self.self_check else ():
            log.info("%s", line)

    def details(self) -> dict[str, Any]:
        """For `/health`."""
        found: dict[str, Any] = {"deterministic": self.deterministic}
        if not self.deterministic:
            found["reasons"] = self.reasons
        check = self.self_check
        if check is not None:
            found["self_check"] = {
                "passed": not check.differences,
                "ways": check.ways,
                "differences": check.differences,
                "read_bandwidth_gb_per_s": _rounded(check.read_bandwidth, 1e-9),
                "kernel_bandwidth_share": {k: _rounded(s) for k, s in check.shares.items()},
                "seconds": _rounded(check.seconds),
            }
        return found


def examine(backend: TorchBackend, check: bool, require: bool, on_progress: OnProgress) -> Findings:
    """What is known about a backend, after a run if one is asked for.

    Args:
        backend: Loaded, and nobody's yet.
        check: Run the self-check.
        require: Refuse a backend whose results may depend on the batch; this runs it as well.
        on_progress: Told that it begins.

    Raises:
        ConfigError: It is required, but the model, the device or a setting rules it out.
        DeviceError: It is required, and a run has shown the opposite.
    """
    findings = Findings(backend.loaded.batch_dependence)
    if require and not findings.deterministic:
        raise ConfigError(
            "engine.deterministic cannot be kept: results may depend on the batch, because "
            f"{'; '.join(findings.reasons)}. Change what is named, or start without it."
        )
    if not (check or require):
        return findings
    on_progress(LoadProgress("self-check", 0.0))
    findings = Findings(findings.batch_dependence, _self_check(backend))
    on_progress(LoadProgress("self-check", 1.0))
    if require and not findings.deterministic:
        raise DeviceError(
            "engine.deterministic cannot be kept: the self-check ran the same request in several "
            f"ways, and {' and '.join(findings.reasons)}. Start without it."
        )
    return findings


def _self_check(backend: TorchBackend) -> SelfCheck:
    start = time.perf_counter()
    ways = results_of_every_way(backend)
    alone = ways.pop("alone")
    speed = backend.measure_kernels()
    shares = dict(speed.shares) if speed else {}
    step = _decode_rate(backend) if speed else None
    if speed and step:
        shares["decode_step"] = step / speed.read_bandwidth
    return SelfCheck(
        differences=tuple(way for way, result in ways.items() if result != alone),
        ways=tuple(ways),
        read_bandwidth=speed.read_bandwidth if speed else None,
        shares=shares,
        seconds=time.perf_counter() - start,
    )


class _Sizes(NamedTuple):
    """What fits into a backend.

    Attributes:
        prompt: Tokens of the request that is checked.
        company: Requests beside it.
    """

    prompt: int
    company: int


def results_of_every_way(backend: ModelBackend) -> dict[str, Result]:
    """Tokens and log-probabilities of one request by the way it was run; the first is `alone`.

    Ways that a backend is too small for are left out, and so is the prefix cache where its blocks
    hold too little.
    """
    info, sizes = backend.info, _sizes(backend)
    plain, chunked = SchedulerConfig(), SchedulerConfig(max_batch_tokens=info.block_size)
    cold = SchedulerConfig(prefix_cache=False)
    target = _request(info, 0, sizes.prompt)
    company = [_request(info, i, 1 + i * 7 % sizes.prompt) for i in range(1, sizes.company + 1)]
    found = {"alone": _run(backend, cold, [target])}
    if len(company) > 1:
        found["beside another"] = _run(backend, cold, [company[0], target])
    if company:
        found[f"in a batch of {len(company) + 1}"] = _run(backend, cold, [*company, target])
    if sizes.prompt > info.block_size:
        found["in chunks"] = _run(backend, chunked, [target])
        if info.prefix_cacheable:
            found["after a prefix hit"] = _run(backend, plain, [target], times=2)
    return found


def _sizes(backend: ModelBackend) -> _Sizes:
    info = backend.info
    room = min(info.max_model_len, info.num_blocks * info.block_size) - _NUM_TOKENS
    prompt = max(1, min(2 * info.block_size + 11, room))
    blocks = -(-(prompt + _NUM_TOKENS) // info.block_size)
    company = min(_COMPANY, info.max_sequences - 1, info.num_blocks // blocks - 1)
    return _Sizes(prompt, max(0, company))


def _request(
    info: BackendInfo, number: int, num_tokens: int, max_tokens: int = _NUM_TOKENS
) -> Request:
    """Sampled, so that a small difference has a chance to show."""
    prompt = tuple(random.Random(number).choices(range(info.vocab_size), k=num_tokens))
    params = SamplingParams(
        seed=number, max_tokens=max_tokens, ignore_eos=True, logprobs=_NUM_LOGPROBS
    )
    return Request(f"self-check-{number}", prompt, params)


def _run(
    backend: ModelBackend, config: SchedulerConfig, requests: list[Request], times: int = 1
) -> Result:
    """What the last request gives, the last time."""
    engine = Engine(backend, config)
    result: Result = ((), ())
    for _ in range(times):
        result = _finish(engine, requests)
    _release(backend, times * len(requests))
    return result


def _finish(engine: Engine, requests: list[Request]) -> Result:
    """Run them side by side until all have ended."""
    for request in requests:
        engine.add(request)
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    while engine.has_work():
        for output in engine.step():
            if output.error is not None:
                raise DeviceError(
                    f"The self-check cannot run: a request ended with {output.error}."
                )
            if output.request_id == requests[-1].id:
                token_ids += output.token_ids
                logprobs += output.logprobs
    return tuple(token_ids), tuple(logprobs)


def _release(backend: ModelBackend, num_sequences: int) -> None:
    """What an engine releases with its next batch, which never comes."""
    backend.forward(Batch((), released=tuple(range(num_sequences)))).result()


def _decode_rate(backend: ModelBackend) -> float | None:
    """Bytes/s that the decode steps of one sequence move; None if the backend does not count."""
    info = backend.info
    max_tokens = max(1, min(_DECODE_STEPS, info.max_model_len - 1))
    engine = Engine(backend, SchedulerConfig(prefix_cache=False))
    _finish(engine, [_request(info, 0, 1, max_tokens)])
    _release(backend, 1)
    stats = engine.stats
    return stats.cost_bytes / stats.device_seconds if stats.device_seconds else None


def _line(check: SelfCheck) -> str:
    verdict = "failed" if check.differences else "passed"
    line = f"Self-check: {verdict} in {check.seconds:.2f} s ({', '.join(check.ways)})"
    if check.read_bandwidth is None:
        return line
    shares = ", ".join(f"{name} {share:.0%}" for name, share in check.shares.items())
    return f"{line}; memory reads {check.read_bandwidth / 1e9:.1f} GB/s, of which {shares}"


def _rounded(number: float | None, unit: float = 1.0) -> float | None:
    return None if number is None else round(number * unit, 3)
