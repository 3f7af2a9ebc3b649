"""vllm-lite with the defaults of its server, without HTTP."""
# ruff: noqa: E402 - how threads wait is settled before torch is imported

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from pathlib import Path

from vllm_models.threads import wait_briefly

wait_briefly()  # as the server does before torch is imported

from vllm_core import Engine
from vllm_models import load_backend
from vllm_server.config import EngineSettings, Settings
from vllm_server.launch import backend_options, scheduler_config
from vllm_traits import Request, SamplingParams

from benchmarks.cpu.runners.plan import Plan, Prompts, Times, measure, serve


class Ours:
    """One engine; requests of a measurement that is over are aborted."""

    def __init__(self, plan: Plan) -> None:
        engine = EngineSettings(
            model=plan.model,
            device="cpu",
            num_threads=plan.threads,
            max_model_len=plan.max_model_len,
            kv_cache_memory=plan.kv_bytes,
        )
        backend = load_backend(backend_options(engine, Path(plan.model)))
        self._engine = Engine(backend, scheduler_config(Settings(engine=engine)))
        self._counts: Counter[str] = Counter()
        self._number = 0

    def run(self, prompts: Prompts, output: int) -> Times:
        """Steps of the engine."""
        self._counts.clear()
        self._number += 1
        names = [f"{self._number}-{place}" for place in range(len(prompts))]
        # The first to begin go on while others still read their prompts.
        room = 1 if output == 0 else output + sum(map(len, prompts))
        params = SamplingParams(temperature=0.0, max_tokens=room, ignore_eos=True)
        for name, prompt in zip(names, prompts, strict=True):
            self._engine.add(Request(name, tuple(prompt), params))
        times = measure(self._step, len(prompts), output)
        for name in names:
            self._engine.abort(name)
        while self._engine.has_work():
            self._engine.step()
        return times

    def _step(self) -> Counter[str]:
        for made in self._engine.step():
            if made.error is not None:
                raise RuntimeError(made.error)
            self._counts[made.request_id] += len(made.token_ids)
        return self._counts


if __name__ == "__main__":
    serve("vllm-lite", lambda plan: (version("vllm-core"), Ours(plan)))
