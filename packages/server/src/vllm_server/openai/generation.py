"""Runs the choices of one request on the engine and hands their news on as they come.

Further choices of a prompt start after the first token of its first one, so that they find its
blocks in the prefix cache. However the reader leaves, nothing keeps running. Knows no text.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from vllm_traits import FinishReason, Request, RequestOutput, SamplingParams, VllmLiteError

from vllm_server.openai.errors import ApiError, from_engine, from_output, unavailable
from vllm_server.openai.sampling import choice_seed
from vllm_server.service import EngineClient, OutputStream

News = tuple[int, RequestOutput]

_UNREAD = 64


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        id: Public id of the request.
        prompts: Token ids.
        params: Sampling of each prompt.
        n: Choices per prompt.
        priority: Lower runs earlier.
        salt: Root of the caller's prefix cache.
        session_id: As the engine knows it.
        prompt_param: Name of the request field that holds the prompt.
    """

    id: str
    prompts: Sequence[tuple[int, ...]]
    params: Sequence[SamplingParams]
    n: int = 1
    priority: int = 0
    salt: bytes = b""
    session_id: str | None = None
    prompt_param: str = "prompt"

    @property
    def num_choices(self) -> int:
        """Choices of all prompts."""
        return len(self.prompts) * self.n

    def request(self, index: int) -> Request:
        """The engine's request for choice `index` = prompt * n + choice of the prompt."""
        prompt, choice = divmod(index, self.n)
        params = self.params[prompt]
        return Request(
            id=self.id if self.num_choices == 1 else f"{self.id}-{index}",
            token_ids=self.prompts[prompt],
            params=replace(params, seed=choice_seed(params.seed, choice)) if choice else params,
            priority=self.priority,
            salt=self.salt,
            session_id=self.session_id,
        )


class Generation:
    """The running choices of one request.

    Args:
        engine: Runs them.
        plan: What to run.
    """

    def __init__(self, engine: EngineClient, plan: Plan) -> None:
        self._engine = engine
        self._plan = plan
        self._streams: dict[int, OutputStream] = {}
        self._pumps: dict[int, asyncio.Task[None]] = {}
        self._queue: asyncio.Queue[News] = asyncio.Queue(_UNREAD)

    def start(self) -> None:
        """Queue the first choice of every prompt.

        Raises:
            ApiError: The engine refuses one; none keeps running.
        """
        try:
            for prompt in range(len(self._plan.prompts)):
                self._submit(prompt * self._plan.n)
        except ApiError:
            self.close()
            raise

    async def news(self) -> AsyncGenerator[News, None]:
        """Outputs of all choices until every one has ended.

        Raises:
            ApiError: A choice failed.
        """
        try:
            if self._plan.num_choices == 1:
                async for output in self._streams[0]:
                    yield 0, _checked(output)
                    if 0 not in self._streams:
                        return
            else:
                async with aclosing(self._merged()) as merged:
                    async for index, output in merged:
                        yield index, _checked(output)
        finally:
            self.close()

    def end(self, index: int, reason: FinishReason = FinishReason.STOP) -> None:
        """A choice is complete for its reader, whatever the engine thinks."""
        stream = self._streams.pop(index, None)
        if stream is not None:
            stream.abort(reason)
        pump = self._pumps.pop(index, None)
        if pump is not None:
            pump.cancel()

    def close(self) -> None:
        """End everything that still runs."""
        for index in list(self._streams):
            self.end(index, FinishReason.ABORT)

    def _submit(self, index: int) -> None:
        try:
            self._streams[index] = self._engine.generate(self._plan.request(index))
        except VllmLiteError as error:
            raise from_engine(error, self._plan.prompt_param) from None

    async def _merged(self) -> AsyncGenerator[News, None]:
        n = self._plan.n
        for index in self._streams:
            self._pump(index)
        waiting = {p * n for p in range(len(self._plan.prompts))} if n > 1 else set[int]()
        while self._streams or not self._queue.empty():
            index, output = await self._queue.get()
            if index in waiting:
                waiting.remove(index)
                for sibling in range(index + 1, index + n):
                    self._submit(sibling)
                    self._pump(sibling)
            if index in self._streams:
                if output.finished:
                    del self._streams[index]
                yield index, output

    def _pump(self, index: int) -> None:
        self._pumps[index] = asyncio.create_task(self._forward(index, self._streams[index]))

    async def _forward(self, index: int, stream: OutputStream) -> None:
        async for output in stream:
            await self._queue.put((index, output))


def _checked(output: RequestOutput) -> RequestOutput:
    if output.finish_reason is FinishReason.ERROR:
        raise from_output(output.error)
    if output.finish_reason is FinishReason.ABORT:
        raise unavailable("draining", "The server is shutting down; the answer is cut.", 5)
    return output


async def first_in_time(news: AsyncGenerator[News, None], seconds: float) -> News:
    """The first output, if it comes in time.

    Raises:
        ApiError: 504 `generation_timeout`.
    """
    try:
        async with asyncio.timeout(seconds):
            return await anext(news)
    except TimeoutError:
        raise ApiError(
            504, "generation_timeout", f"No token was generated within {seconds:g} seconds."
        ) from None
