"""Drives the engine in this thread, without HTTP or text: what the machine itself can do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import vllm_core
from vllm_models import LoadProgress
from vllm_traits import FinishReason, ModelBackend, Request, SamplingParams

from vllm_server.bench.report import Report, Result
from vllm_server.bench.workload import Prompt, Workload
from vllm_server.config import Settings
from vllm_server.launch import LoadedModel, load_model, model_names
from vllm_server.progress import ProgressLines
from vllm_server.text.tokenizer import Tokenizer


def throughput(settings: Settings, workload: Workload) -> Report:
    """All prompts at once."""
    model = _load(settings, workload)
    with _Driver(model) as driver:
        driver.run(workload.prompts()[:1])
        start = time.perf_counter()
        results = driver.run(workload.prompts())
        seconds = time.perf_counter() - start
    return Report(_setting("throughput", settings, workload), seconds, results)


def latency(settings: Settings, workload: Workload, num_iters: int) -> Report:
    """The same batch of prompts again and again, each after the one before has ended."""
    model = _load(settings, workload)
    results: list[Result] = []
    with _Driver(model) as driver:
        driver.run(workload.prompts())
        start = time.perf_counter()
        for i in range(num_iters):
            results += driver.run(replace(workload, seed=workload.seed + i + 1).prompts())
        seconds = time.perf_counter() - start
    return Report(_setting("latency", settings, workload), seconds, results)


def _load(settings: Settings, workload: Workload) -> LoadedModel:
    progress = ProgressLines()

    def on_progress(news: LoadProgress) -> None:
        progress(news)

    model = load_model(settings, on_progress)
    model.findings.log()
    room = max(workload.num_prompts, model.scheduler.max_waiting)
    return replace(model, scheduler=replace(model.scheduler, max_waiting=room))


class _Driver:
    """An engine and the requests that run on it."""

    def __init__(self, model: LoadedModel) -> None:
        backend: ModelBackend = model.backend
        self._engine = vllm_core.Engine(backend, model.scheduler)
        self._tokenizer: Tokenizer = model.tokenizer
        self._vocab_size = backend.info.vocab_size
        self._next_id = 0

    def __enter__(self) -> _Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    def run(self, prompts: Sequence[Prompt]) -> list[Result]:
        """Add all, step until all have ended."""
        results = {request.id: self._add(request) for request in map(self._request, prompts)}
        while self._engine.has_work():
            outputs = self._engine.step()
            now = time.perf_counter()
            for output in outputs:
                result = results[output.request_id]
                if output.token_ids:
                    result.times.append(now)
                    result.num_output_tokens += len(output.token_ids)
                if output.finish_reason is not None:
                    result.end = now
                if output.finish_reason is FinishReason.ERROR:
                    result.error = output.error or "error"
        return list(results.values())

    def _add(self, request: Request) -> Result:
        result = Result(start=time.perf_counter(), num_prompt_tokens=len(request.token_ids))
        self._engine.add(request)
        return result

    def _request(self, prompt: Prompt) -> Request:
        self._next_id += 1
        ids = prompt.content
        token_ids = self._tokenizer.encode(ids) if isinstance(ids, str) else ids
        return Request(
            f"bench-{self._next_id}",
            tuple(i % self._vocab_size for i in token_ids),
            SamplingParams(temperature=0.0, max_tokens=prompt.output_len, ignore_eos=True),
        )


def _setting(kind: str, settings: Settings, workload: Workload) -> dict[str, Any]:
    return {
        "kind": kind,
        "model": model_names(settings)[0],
        "num_prompts": workload.num_prompts,
        "dataset": workload.dataset,
        "input_len": workload.input_len,
        "output_len": workload.output_len,
        "spread": workload.spread,
        "seed": workload.seed,
    }
