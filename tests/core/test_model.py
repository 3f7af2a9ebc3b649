"""State machines over the block pool and over the whole scheduler, checked after every rule."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from core_reference import ParityGrammar, reference
from core_tools import INFO, Clock, ask
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)
from vllm_core import Engine, SchedulerConfig
from vllm_core.kv_cache.keys import KeyChain, Root
from vllm_core.kv_cache.pool import BlockPool
from vllm_core.testing import DelayedBackend, DictStore, SimBackend, violations
from vllm_traits import FinishReason, Request, RequestOutput

PROFILE = settings(
    derandomize=True,
    max_examples=250,
    stateful_step_count=50,
    deadline=None,
    phases=(Phase.generate,),  # bounded time; shrink by hand what it finds
    suppress_health_check=[HealthCheck.too_slow],
)
NUM_BLOCKS = 6


def bits(data: bytes) -> bytes:
    """Two bits of a checksum: most keys collide."""
    return bytes([sum(data) & 3])


class PoolMachine(RuleBasedStateMachine):
    """Owners take, share, publish and drop blocks; a plain dictionary knows who holds what."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.owners: Counter[int] = Counter()
        self.content_of: dict[int, tuple[bytes, tuple[bytes, ...]]] = {}  # root, all contents

    @rule(
        target=tables,
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4),
        salt=st.sampled_from([b"", b"x"]),
    )
    def start(self, tokens: list[int], salt: bytes) -> Any:
        """Match, share what was found, take the rest and publish it."""
        chain = KeyChain(Root(b"", salt, None), 1, bits)
        chain.extend(tokens, len(tokens))
        found, parent = self.pool.match(chain, len(tokens))
        for index, block in enumerate(found):
            expected = (salt, tuple(chain.contents[: index + 1]))
            assert self.content_of[block] == expected, "a hit on other content"
        self.pool.share(found)
        rest = self.pool.take(len(tokens) - len(found))
        if rest is None:
            self.pool.drop(found)
            return multiple()
        for index, block in enumerate(rest, len(found)):
            self.content_of[block] = (salt, tuple(chain.contents[: index + 1]))
            parent = self.pool.publish(block, chain.keys[index], chain.contents[index], parent)
        self.owners.update(found + rest)
        return found + rest

    @rule(table=tables)
    def share(self, table: list[int]) -> None:
        """A second owner comes and goes."""
        self.pool.share(table)
        self.pool.drop(table)

    @rule(table=consumes(tables))
    def drop(self, table: list[int]) -> None:
        self.pool.drop(table)
        self.owners.subtract(table)

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def forget(self, block: int) -> None:
        if self.pool.entries[block] is not None:
            self.pool.unpublish(block)

    @invariant()
    def references_are_owners(self) -> None:
        assert self.pool.refs == [self.owners[block] for block in range(NUM_BLOCKS)]

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        held = [block for block in range(NUM_BLOCKS) if self.pool.refs[block]]
        places = sorted([*held, *self.pool.empty, *self.pool.cached])
        assert places == list(range(NUM_BLOCKS))

    @invariant()
    def the_index_points_to_what_it_says(self) -> None:
        for key, block in self.pool.block_of.items():
            entry = self.pool.entries[block]
            assert entry is not None and entry.key == key
        assert len(self.pool.block_of) == sum(entry is not None for entry in self.pool.entries)


PoolMachine.TestCase.settings = PROFILE
TestPool = PoolMachine.TestCase


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, go, pause, fail and expire on a pool that is always too small."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.paused: set[str] = set()
        self.idle_steps = 0
        self.fail_next_row = False

    @initialize(
        overlap=st.booleans(),
        delay=st.sampled_from([0, 3]),
        store=st.booleans(),
        drafts=st.sampled_from([0, 2]),
        policy=st.sampled_from(["fcfs", "priority", "shortest"]),
        cap=st.sampled_from([1, 8]),
    )
    def build(
        self, overlap: bool, delay: int, store: bool, drafts: int, policy: Any, cap: int
    ) -> None:
        info = replace(INFO, num_blocks=10, max_model_len=72, num_drafts=drafts, max_sequences=4)
        self.sim = SimBackend(info, [DictStore()] if store else [])
        backend = DelayedBackend(self.sim, delay, fail_row=self.fail_row)
        config = SchedulerConfig(
            policy=policy,
            overlap=overlap,
            max_batch_tokens=9,
            max_preemptions=cap,
            watermark=0.0,
            session_ttl_s=50.0,
        )
        self.engine = Engine(backend, config, clock=self.clock)

    def fail_row(self, number: int, chunk: Any) -> str | None:
        failing, self.fail_next_row = self.fail_next_row, False
        return "row_failed" if failing else None

    @rule(
        prefix=st.integers(0, 14),
        tail=st.integers(1, 9),
        max_tokens=st.sampled_from([0, 1, 6, 25]),
        salt=st.sampled_from([b"", b"x"]),
        session=st.sampled_from([None, "s", "t"]),
        priority=st.integers(0, 2),
        masked=st.booleans(),
    )
    def add(self, prefix: int, tail: int, max_tokens: int, masked: bool, **rest: Any) -> None:
        name = str(len(self.requests))
        tokens = (*range(1, prefix + 1), *range(tail, 0, -1))
        grammar = ParityGrammar() if masked else None
        outer = {"salt": rest["salt"], "session_id": rest["session"], "priority": rest["priority"]}
        request = ask(name, tokens, max_tokens, grammar=grammar, ignore_eos=True, **outer)
        self.engine.add(request)
        self.requests[name] = request

    @rule(number=st.integers(0, 60))
    def abort(self, number: int) -> None:
        self.engine.abort(str(number))

    @rule(number=st.integers(0, 60))
    def pause(self, number: int) -> None:
        if self.engine.scheduler.roster.find(str(number)) is not None:
            self.engine.pause(str(number))
            self.paused.add(str(number))

    @rule()
    def resume_everybody(self) -> None:
        for name in sorted(self.paused):
            self.engine.resume(name)
        self.paused.clear()
        self.idle_steps = 0

    @rule(seconds=st.sampled_from([0.5, 49.0, 3600.0, -3600.0]))
    def clock_jumps(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def a_row_fails(self) -> None:
        self.fail_next_row = True

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            before = self.engine.progress
            for output in self.engine.step():
                self.outputs.setdefault(output.request_id, []).append(output)
            stuck = self.engine.progress == before and self.feasible()
            self.idle_steps = self.idle_steps + 1 if stuck else 0
            assert self.idle_steps < 8, self.picture()

    def picture(self) -> str:
        """Why work that is pending may not be scheduled."""
        scheduler = self.engine.scheduler
        lines = [f"nothing is scheduled; {scheduler.cache.pool.num_available} blocks available"]
        for seq in scheduler.roster.sequences.values():
            loading = seq.table.loading is not None
            lines.append(
                f"{seq.id}: {len(seq.tokens)} tokens, {len(seq.table.blocks)} blocks, "
                f"{loading=} {seq.paused=} {seq.started=} {seq.num_preemptions=}"
            )
        return "\n".join(lines)

    def feasible(self) -> bool:
        """Somebody is not paused."""
        roster = self.engine.scheduler.roster
        return any(not seq.paused and not seq.finished for seq in roster.sequences.values())

    @invariant()
    def nothing_is_violated(self) -> None:
        if self.requests:
            assert violations(self.engine.scheduler) == []
            assert self.engine.fault is None, self.engine.fault

    def teardown(self) -> None:
        """Let everything end: each completion is the reference's, and every block is free."""
        if not self.requests:
            return
        self.resume_everybody()
        for _ in range(2000):
            if not self.engine.has_work():
                break
            self.step(1)
        assert not self.engine.scheduler.roster.sequences
        for name, request in self.requests.items():
            outputs = self.outputs[name]
            tokens = tuple(token for output in outputs for token in output.token_ids)
            expected = reference(request, 40)
            if outputs[-1].finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                expected = expected[: len(tokens)]
            assert tokens == expected
        self.engine.scheduler.cache.sessions.clear()
        assert self.engine.scheduler.cache.pool.num_available == 10


SchedulerMachine.TestCase.settings = PROFILE
TestScheduler = SchedulerMachine.TestCase
