"""News of all choices of a request as text, for whoever streams or collects them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, contextmanager

from vllm_server.openai.choice import Choice, Delta
from vllm_server.openai.errors import ApiError
from vllm_server.openai.generation import Generation, Plan, first_in_time
from vllm_server.ops.routes import Call
from vllm_server.service import Service


async def deltas(
    call: Call, service: Service, plan: Plan, choices: Sequence[Choice]
) -> AsyncGenerator[tuple[int, Delta], None]:
    """News of the choices until all have ended; leaving early ends them.

    Raises:
        ApiError: The request cannot run, or a choice failed.
    """
    with reserved(call, plan.id):
        exchange = call.exchange
        exchange.num_prompt_tokens = sum(map(len, plan.prompts))
        generation = Generation(service.engine, plan)
        generation.start()
        async with aclosing(generation.news()) as news:
            index, output = await first_in_time(news, call.state.settings.server.request_timeout)
            exchange.first_token_at = time.perf_counter()
            while True:
                delta = choices[index].take(output)
                exchange.num_completion_tokens += len(delta.token_ids)
                if delta.is_final:
                    generation.end(index)
                yield index, delta
                try:
                    index, output = await anext(news)
                except StopAsyncIteration:
                    return


@contextmanager
def reserved(call: Call, plan_id: str) -> Generator[None]:
    """Hold an id while its request runs.

    Raises:
        ApiError: 409 if it is running already.
    """
    running = call.state.running
    if plan_id in running:
        raise ApiError(409, "conflict", "A request of this id is still running.", "request_id")
    running.add(plan_id)
    try:
        yield
    finally:
        running.discard(plan_id)
