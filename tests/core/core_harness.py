"""Random runs of an engine against a plain loop: every feature at once, on tiny pools.

`run(seed, setting)` lets requests arrive, be aborted, paused and resumed at random, and compares
every completion with `reference`, token for token. What it returns says which paths were taken.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import product
from random import Random
from typing import Any, Literal, NamedTuple

from core_reference import EOS, MAX_MODEL_LEN, VOCAB_SIZE, ParityGrammar, reference
from vllm_core import Engine, Scheduler, SchedulerConfig
from vllm_core.kv_cache.keys import sha256
from vllm_core.scheduler.propose import ProposerFactory
from vllm_core.testing import DelayedBackend, DictStore, SimBackend, next_token, violations
from vllm_traits import (
    BackendInfo,
    Batch,
    Chunk,
    FinishReason,
    InFlight,
    PoolingParams,
    Request,
    RequestOutput,
    SamplingParams,
)

BLOCK_SIZE = 4
NUM_REQUESTS = 14
MAX_STEPS = 3000


class Setting(NamedTuple):
    """One corner of the feature matrix; the rest is drawn from the seed."""

    overlap: bool
    drafts: Literal["none", "backend", "host"]
    store: bool
    grammar: bool
    num_blocks: int  # 16 blocks force preemption, 160 do not


SETTINGS = [
    Setting(*values)
    for values in product(
        (False, True), ("none", "backend", "host"), (False, True), (False, True), (16, 160)
    )
]


def weak_digest(data: bytes) -> bytes:
    """Eight bits: keys collide all the time, and outputs must not notice."""
    return sha256(data)[:1]


class WatchedBackend(DelayedBackend):
    """Notes every chunk of a request that must not be scheduled."""

    def __init__(self, run: Run, **options: Any) -> None:
        super().__init__(run.sim, **options)
        self._run = run

    def forward(self, batch: Batch) -> InFlight:
        sequences = self._run.engine.scheduler.roster.sequences
        launched = {sequences[chunk.seq_id].request.id for chunk in batch.chunks}
        self._run.scheduled_though_paused |= launched & self._run.paused
        return super().forward(batch)


@dataclass
class Run:
    """An engine, what was asked of it and what it answered."""

    seed: int
    setting: Setting
    random: Random = field(init=False)
    now: float = 0.0
    taken: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = Random(self.seed * 1000 + SETTINGS.index(self.setting))
        random, setting = self.random, self.setting
        self.info = BackendInfo(
            num_blocks=setting.num_blocks,
            block_size=BLOCK_SIZE,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=frozenset({EOS}),
            max_sequences=random.choice([3, 8]),
            max_batch_tokens=random.choice([4, 9, 16, 64]),
            num_drafts=3 if setting.drafts == "backend" else 0,
            fingerprint=b"sim",
        )
        ngrams = setting.drafts == "host" and random.random() < 0.3
        self.config = SchedulerConfig(
            policy=random.choice(["fcfs", "priority", "shortest"]),
            overlap=setting.overlap,
            watermark=random.choice([0.0, 0.1]),
            max_preemptions=random.choice([1, 2, 8]),
            num_ngram_drafts=2 if ngrams else 0,
            session_ttl_s=random.choice([20.0, 1e9]),
        )
        self.sim = SimBackend(self.info, self.stores())
        faults, fails_early = self.some_batches(), random.random() < 0.5
        self.backend = WatchedBackend(
            self,
            delay=random.choice([0, 1, 3]),
            fail_row=self.fail_row if random.random() < 0.2 else None,
            fail_forward=faults if fails_early else (),
            fail_result=() if fails_early else faults,
        )
        propose = self.proposer() if setting.drafts == "host" and not ngrams else None
        self.engine = Engine(self.backend, self.config, propose=propose, clock=lambda: self.now)
        if not setting.store and random.random() < 0.3:
            self.engine.scheduler = Scheduler(
                self.info,
                config=self.config,
                propose=propose,
                clock=lambda: self.now,
                digest=weak_digest,
            )
            self.taken["runs with a weak digest"] += 1
        self.requests = self.random_requests()
        self.got: dict[str, list[RequestOutput]] = {}
        self.may_end_early: set[str] = set()
        self.paused: set[str] = set()
        self.scheduled_though_paused: set[str] = set()

    def stores(self) -> list[DictStore]:
        if not self.setting.store:
            return []
        random = self.random
        arriving = random.choice([1.0, 1.0, 0.5])
        return [DictStore(delay=random.choice([1, 4, 10]), arriving=arriving)]

    def some_batches(self) -> set[int]:
        """Now and then one that fails; later others, with progress in between."""
        if self.random.random() < 0.85:
            return set()
        first = self.random.randint(2, 20)
        return {first, first + 30}

    def proposer(self) -> ProposerFactory:
        """Right for requests of seed 0, wrong for others."""
        return lambda: lambda tokens: [next_token(tokens, 0), 1]

    def fail_row(self, number: int, chunk: Chunk) -> str | None:
        return "row_failed" if (number * 31 + chunk.seq_id * 7) % 97 == 0 else None

    def random_requests(self) -> list[Request]:
        random = self.random
        shared = [self.tokens(random.randint(0, 24)) for _ in range(2)]
        return [
            self.random_request(number, random.choice(shared)) for number in range(NUM_REQUESTS)
        ]

    def tokens(self, count: int) -> list[int]:
        return [self.random.randint(1, 50) for _ in range(count)]

    def random_request(self, number: int, prefix: list[int]) -> Request:
        random = self.random
        grammar = None
        if self.setting.grammar and number % 3 == 0:
            grammar = ParityGrammar(fails_at=2 if random.random() < 0.1 else None)
        params: SamplingParams | PoolingParams = SamplingParams(
            seed=random.choice([0, 0, 5]),
            max_tokens=random.choice([0, 1, 2, 6, 12, 20, 60]),
            min_tokens=random.choice([0, 0, 3]),
            stop_token_ids=frozenset(self.tokens(1)),
            ignore_eos=random.random() < 0.5,
            logprobs=random.choice([None, 0]),
            prompt_logprobs=random.choice([None, None, None, 0]),
        )
        if grammar is None and random.random() < 0.05:
            params = PoolingParams()
        return Request(
            id=str(number),
            token_ids=tuple(prefix + self.tokens(random.randint(1, 10))),
            params=params,
            priority=random.choice([0, 0, 5]),
            salt=random.choice([b"", b"", b"tenant"]),
            session_id=random.choice([None, None, "a", "b"]),
            grammar=grammar,
        )

    def execute(self) -> Counter[str]:
        """Run to the end, then compare."""
        arriving = list(self.requests)
        steps = 0
        while arriving or self.engine.has_work():
            steps += 1
            self.now += 0.5
            assert steps < MAX_STEPS, "the engine makes no progress"
            if arriving and self.random.random() < 0.8:
                self.engine.add(arriving.pop(0))
            self.disturb(calm=steps > MAX_STEPS // 3)
            for output in self.engine.step():
                self.got.setdefault(output.request_id, []).append(output)
            if steps % 8 == 0:
                self.check_invariants()
        self.check_invariants()
        assert not self.scheduled_though_paused
        self.check_outputs()
        self.check_nothing_is_left()
        return self.count()

    def disturb(self, calm: bool) -> None:
        """Abort, pause or resume somebody, now and then; when calm, only resume."""
        random, draw = self.random, self.random.random()
        if draw < 0.04 and not calm:
            self.abort(str(random.randrange(NUM_REQUESTS)))
        elif draw < 0.07 and not calm:
            request_id = str(random.randrange(NUM_REQUESTS))
            self.engine.pause(request_id)
            if self.engine.scheduler.roster.find(request_id) is not None:
                self.paused.add(request_id)
                self.taken["pauses"] += 1
        elif self.paused and (draw < 0.2 or calm):
            self.engine.resume(request_id := min(self.paused))
            self.paused.remove(request_id)

    def abort(self, request_id: str) -> None:
        self.taken[f"abort {self.state(request_id)}"] += 1
        self.may_end_early.add(request_id)
        self.engine.abort(request_id)

    def state(self, request_id: str) -> str:
        """Where a request stands, as far as abort is concerned."""
        seq = self.engine.scheduler.roster.find(request_id)
        if seq is None:
            return "unknown or finished"
        if seq.started:
            return "in flight" if seq.in_flight else "running"
        if seq.table.loading is not None:
            return "loading"
        return "waiting" if seq.times.admitted is None else "preempted"

    def check_invariants(self) -> None:
        found = violations(self.engine.scheduler)
        assert not found, (self.seed, self.setting, found)

    def check_outputs(self) -> None:
        for request in self.requests:
            outputs = self.got[request.id]
            assert all(output.finish_reason is None for output in outputs[:-1])
            reason = outputs[-1].finish_reason
            assert reason is not None, f"request {request.id} never ended"
            said = tuple(token for output in outputs for token in output.token_ids)
            expected = self.expected(request)
            where = (self.seed, self.setting, request)
            if reason is FinishReason.ABORT:
                assert request.id in self.may_end_early, where
                assert said == expected[: len(said)], where
            elif reason is FinishReason.ERROR:
                self.check_error(request, outputs[-1])
                assert said == expected[: len(said)], where
            else:
                assert said == expected, (where, said, expected)
                self.check_ending(request, outputs)
            self.check_logprobs(request, outputs, said)

    def expected(self, request: Request) -> tuple[int, ...]:
        if isinstance(request.params, PoolingParams):
            return ()
        return reference(request, self.info.num_blocks * BLOCK_SIZE)

    def check_ending(self, request: Request, outputs: list[RequestOutput]) -> None:
        """The reason says what the last token says."""
        last, params = outputs[-1], request.params
        if isinstance(params, PoolingParams):
            assert last.embedding == (float(next_token(request.token_ids)),)
            return
        said = [token for output in outputs for token in output.token_ids]
        stops = bool(said) and said[-1] in params.stop_token_ids
        ends = bool(said) and said[-1] == EOS and not params.ignore_eos
        counts = len(said) > params.min_tokens
        stopped = (stops or ends) and counts
        assert last.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
        assert last.stop_token_id == (said[-1] if stops and stopped and not ends else None)
        if params.prompt_logprobs is not None:
            self.check_prompt_logprobs(request, outputs)

    def check_prompt_logprobs(self, request: Request, outputs: list[RequestOutput]) -> None:
        prompt = request.token_ids
        assert outputs[0].prompt_logprobs[0] is None
        assert not any(output.prompt_logprobs for output in outputs[1:])
        for place, entry in enumerate(outputs[0].prompt_logprobs[1:], start=1):
            assert entry is not None
            assert entry.token_id == prompt[place]
            assert entry.logprob == -next_token(prompt[:place])
        assert len(outputs[0].prompt_logprobs) == len(prompt)

    def check_logprobs(
        self, request: Request, outputs: list[RequestOutput], said: tuple[int, ...]
    ) -> None:
        params = request.params
        entries = [entry for output in outputs for entry in output.logprobs]
        asked = isinstance(params, SamplingParams) and params.logprobs is not None
        if outputs[-1].finish_reason is not FinishReason.ERROR:
            assert tuple(entry.token_id for entry in entries) == (said if asked else ())

    def check_error(self, request: Request, last: RequestOutput) -> None:
        """Only what was broken on purpose may fail."""
        match last.error:
            case "grammar_error":
                assert isinstance(request.grammar, ParityGrammar)
                assert request.grammar._fails_at is not None
            case "row_failed":
                assert self.backend.num_failed_rows
            case "engine_unavailable":
                assert self.backend.num_faults
            case _:
                raise AssertionError(last)

    def check_nothing_is_left(self) -> None:
        scheduler = self.engine.scheduler
        pool, sessions = scheduler.cache.pool, scheduler.cache.sessions
        assert not scheduler.roster.sequences
        assert len(self.sim.rows) == len(scheduler.roster.released) or self.backend.num_faults
        self.taken["pinned at the end"] += sessions.num_pinned
        sessions.clear()
        assert pool.num_available == self.setting.num_blocks, "blocks leaked"
        assert not any(pool.refs)

    def count(self) -> Counter[str]:
        stats, taken = self.engine.stats, self.taken
        taken["runs"] += 1
        taken["preemptions"] += stats.preemptions
        taken["hits"] += stats.prefix_cache_hits
        taken["loaded blocks"] += stats.loaded_blocks
        taken["saved blocks"] += stats.saved_blocks
        taken["mixed batches"] += stats.mixed_steps
        taken["drafts"] += stats.spec_draft_tokens
        taken["accepted drafts"] += stats.spec_accepted_tokens
        taken["failed rows"] += self.backend.num_failed_rows
        taken["batch faults"] += stats.batch_faults
        for reason, number in stats.finished.items():
            taken[f"finished by {reason}"] += number
        said = sum(len(output.token_ids) for each in self.got.values() for output in each)
        assert stats.generation_tokens == said, "generation tokens are exact"
        return taken


def run(seed: int, setting: Setting) -> Counter[str]:
    """One random run; raises AssertionError if anything differs from the reference."""
    return Run(seed, setting).execute()
