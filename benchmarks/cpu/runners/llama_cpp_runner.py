"""llama.cpp through the low-level functions of llama-cpp-python; run by that environment's Python.

Flash attention, all threads for prompts and tokens, and greedy by argmax of the logits.
"""

from __future__ import annotations

import time

import llama_cpp
import numpy as np

from benchmarks.cpu.runners.plan import Plan, Prompts, Times, serve

_BATCH = 2048  # tokens per call; the library divides them as its default says
_WARNING = 3


@llama_cpp.llama_log_callback
def _warnings_only(level: int, text: bytes, _: object) -> None:
    if level > _WARNING:
        print(text.decode(errors="replace"), end="")


class LlamaCpp:
    """A model, and a context for as many sequences as the task at hand has."""

    def __init__(self, plan: Plan) -> None:
        llama_cpp.llama_log_set(_warnings_only, None)
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(plan.model.encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {plan.model}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )
        self._threads = plan.threads
        self._lengths: dict[int, int] = {}  # by batch
        for task in plan.tasks:
            length = task.prompt + task.output + 1
            self._lengths[task.batch] = max(length, self._lengths.get(task.batch, 0))
        self._context = self._new_context(plan.tasks[0].batch)
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)

    def _new_context(self, sequences: int) -> object:
        self._sequences = sequences
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * -(-self._lengths[sequences] // 256) * 256
        params.n_batch = _BATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = sequences == 1  # else every sequence passes over the KV of all
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError("llama.cpp cannot make a context")
        return context

    def run(self, prompts: Prompts, output: int) -> Times:
        """Prompts in calls of up to 2,048 tokens, then one call per token of all."""
        if len(prompts) != self._sequences:
            llama_cpp.llama_free(self._context)
            self._context = self._new_context(len(prompts))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        began = time.perf_counter()
        tokens = self._read(prompts)
        first = time.perf_counter()
        for place in range(output):
            position = len(prompts[0]) + place
            tokens = self._compute([(token, position, i, True) for i, token in enumerate(tokens)])
        now = time.perf_counter()
        return Times(first - began, now - first, output * len(prompts))

    def _read(self, prompts: Prompts) -> list[int]:
        """The first token of each."""
        entries = [
            (token, position, number, position == len(prompt) - 1)
            for number, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        calls = [entries[start : start + _BATCH] for start in range(0, len(entries), _BATCH)]
        return [token for call in calls for token in self._compute(call)]

    def _compute(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """The tokens of those entries (token, position, sequence, sampled) that are sampled."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, sampled) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = sampled
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        return [self._argmax(i) for i, entry in enumerate(entries) if entry[3]]

    def _argmax(self, place: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, place)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self._vocab_size,))))


if __name__ == "__main__":
    serve("llama.cpp", lambda plan: (llama_cpp.__version__, LlamaCpp(plan)))
