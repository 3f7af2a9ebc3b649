"""Transformers in bfloat16 with its own cache, as a plain loop."""

from __future__ import annotations

import time

import torch
import transformers

from benchmarks.cpu.runners.plan import Plan, Prompts, Times, serve


class Transformers:
    """A model in eager mode."""

    def __init__(self, plan: Plan) -> None:
        torch.set_num_threads(plan.threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            plan.model, dtype=torch.bfloat16
        ).eval()

    @torch.inference_mode()
    def run(self, prompts: Prompts, output: int) -> Times:
        """All prompts in one call, then one call per token of all."""
        began = time.perf_counter()
        made = self._model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        tokens = made.logits[:, -1:].argmax(-1)
        first = time.perf_counter()
        for _ in range(output):
            cache = made.past_key_values
            made = self._model(tokens, past_key_values=cache, use_cache=True)
            tokens = made.logits[:, -1:].argmax(-1)
        now = time.perf_counter()
        return Times(first - began, now - first, output * len(prompts))


if __name__ == "__main__":
    serve("transformers", lambda plan: (transformers.__version__, Transformers(plan)))
