"""The torch backend as an engine sees it, batch by batch."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm_core import Engine, SchedulerConfig
from vllm_models import TorchBackend
from vllm_traits import (
    BackendError,
    Batch,
    BatchOutput,
    Chunk,
    PoolingParams,
    Request,
    SamplingParams,
    Start,
)

GREEDY = SamplingParams(temperature=0.0)
PROMPT = tuple(random.Random(3).choices(range(3, 128), k=11))


def step(backend: TorchBackend, *chunks: Chunk, **batch: Any) -> BatchOutput:
    in_flight = backend.forward(Batch(chunks, **batch))
    in_flight.sample()
    return in_flight.result()


def start(seq_id: int = 0, params: Any = GREEDY, prompt: tuple[int, ...] = PROMPT) -> Start:
    return Start(seq_id, prompt, params, seed=seq_id, num_prompt_tokens=len(prompt))


def blocks(first: int, count: int = 6) -> tuple[int, ...]:
    return tuple(range(first, first + count))


def decode(backend: TorchBackend, seq_id: int, first: int, count: int) -> tuple[int, ...]:
    """Tokens of single decodes, from a sequence whose prompt of `first` tokens is computed."""
    tokens: tuple[int, ...] = ()
    for position in range(first, first + count):
        tokens += step(backend, Chunk(seq_id, position, 1)).token_ids[seq_id]
    return tokens


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.5)])
@pytest.mark.parametrize("num_right", [0, 1, 2, 3])
def test_drafts_are_accepted_up_to_the_first_wrong_one(
    small: Any, params: SamplingParams, num_right: int
) -> None:
    backend = small.load()
    begin = Chunk(0, 0, 11, blocks(0))
    first = step(backend, begin, starts=(start(0, params),)).token_ids[0]
    truth = first + decode(backend, 0, 11, 8)
    step(backend, released=(0,))
    step(backend, begin, starts=(start(0, params),))
    drafts = truth[1 : 1 + num_right] + tuple(t ^ 1 for t in truth[1 + num_right : 4])
    output = step(backend, Chunk(0, 11, 4, num_drafts=3, draft_ids=drafts))
    assert output.token_ids[0] == truth[1 : num_right + 2]
    following = decode(backend, 0, 12 + num_right, 8 - num_right - 1)
    assert following == truth[num_right + 2 :]


def test_logprobs_come_with_every_accepted_draft(small: Any) -> None:
    backend = small.load()
    params = replace(GREEDY, logprobs=2)
    first = step(backend, Chunk(0, 0, 11, blocks(0)), starts=(start(0, params),)).token_ids[0]
    truth = first + decode(backend, 0, 11, 3)
    step(backend, Chunk(1, 0, 11, blocks(8)), starts=(start(1, params),))
    output = step(backend, Chunk(1, 11, 3, num_drafts=2, draft_ids=truth[1:3]))
    assert output.token_ids[1] == truth[1:4]
    assert tuple(entry.token_id for entry in output.logprobs[1]) == truth[1:4]


def test_penalties_count_drafts_before_a_verified_position(small: Any) -> None:
    params = replace(GREEDY, presence_penalty=2.0, repetition_penalty=1.7)
    backend = small.load()
    first = step(backend, Chunk(0, 0, 11, blocks(0)), starts=(start(0, params),)).token_ids[0]
    truth = first + decode(backend, 0, 11, 3)
    step(backend, Chunk(1, 0, 11, blocks(8)), starts=(start(1, params),))
    output = step(backend, Chunk(1, 11, 4, num_drafts=3, draft_ids=truth[1:4]))
    assert output.token_ids[1][:3] == truth[1:4]


def test_masked_sequences_wait_for_their_masks(small: Any) -> None:
    backend = small.load()
    chunks = (Chunk(0, 0, 11, blocks(0), masked=True), Chunk(1, 0, 11, blocks(8)))
    in_flight = backend.forward(Batch(chunks, (start(0), start(1))))
    assert not in_flight.done()
    in_flight.sample({0: (1 << 77).to_bytes(16, "little")})
    output = in_flight.result()
    assert output.token_ids[0] == (77,)
    assert output.token_ids[1] == small.greedy(PROMPT, 1)
    assert step(backend, Chunk(0, 11, 1)).token_ids[0] == small.greedy((*PROMPT, 77), 1)


def test_logits_are_computed_only_for_rows_that_sample(small: Any) -> None:
    backend = small.load()
    rows: list[int] = []
    model = backend._runner._model
    original = model.logits
    model.logits = lambda hidden: (rows.append(len(hidden)), original(hidden))[1]
    step(
        backend,
        Chunk(0, 0, 8, blocks(0), sample=False),
        Chunk(1, 0, 11, blocks(8)),
        starts=(start(0), start(1)),
    )
    assert rows == [1]


BAD_STARTS = {
    "invalid_value": Start(0, (1, 2, 128), GREEDY),
    "adapter_not_found": Start(0, PROMPT, GREEDY, adapter="poet"),
    "context_length_exceeded": Start(0, (1,) * 400, GREEDY),
}


@pytest.mark.parametrize("code", BAD_STARTS)
def test_a_sequence_that_cannot_run_fails_alone(small: Any, code: str) -> None:
    backend = small.load()
    bad = BAD_STARTS[code]
    length = len(bad.token_ids)
    chunks = (Chunk(0, 0, length, blocks(8, length)), Chunk(1, 0, 11, blocks(0)))
    output = step(backend, *chunks, starts=(bad, start(1)))
    assert output.failed == {0: code}
    assert output.token_ids == {1: small.greedy(PROMPT, 1)}
    alone = step(backend, Chunk(0, 0, 1), starts=())
    assert alone.failed == {0: code} and not alone.token_ids


@pytest.mark.parametrize(
    "changes",
    [
        {"allowed_token_ids": (128,)},
        {"logit_bias": ((-1, 1.0),)},
        {"bad_token_ids": ((1, 500),)},
        {"stop_token_ids": frozenset({1000})},
    ],
)
def test_ids_outside_the_vocabulary_fail_their_sequence(
    small: Any, changes: dict[str, Any]
) -> None:
    backend = small.load()
    output = step(
        backend, Chunk(0, 0, 11, blocks(0)), starts=(start(0, replace(GREEDY, **changes)),)
    )
    assert output.failed == {0: "invalid_value"}


def test_wrong_numbers_of_one_sequence_never_reach_the_next_owner_of_its_blocks(
    small: Any, torch_products: None
) -> None:
    backend = small.load()
    poisoned, healthy = start(0, prompt=(5, *PROMPT, *PROMPT)), start(1)
    embedding = backend._runner._model.model.embed_tokens.weight
    kept = embedding[5].clone()
    embedding[5] = torch.nan
    output = step(
        backend,
        Chunk(0, 0, 23, blocks(0)),
        Chunk(1, 0, 11, blocks(8)),
        starts=(poisoned, healthy),
    )
    assert output.failed == {0: "non_finite_logits"}
    assert output.token_ids == {1: small.greedy(PROMPT, 1)}
    embedding[5] = kept
    output = step(backend, Chunk(2, 0, 11, blocks(0)), starts=(start(2),), released=(0,))
    tokens = output.token_ids[2] + decode(backend, 2, 11, 6)
    assert tokens == small.greedy(PROMPT, 7)


def test_a_row_forgets_the_blocks_of_its_last_sequence(small: Any, torch_products: None) -> None:
    backend = small.load(max_sequences=2)
    step(backend, Chunk(0, 0, 11, blocks(0)), starts=(start(0),))
    embedding = backend._runner._model.model.embed_tokens.weight
    kept, embedding[5] = embedding[5].clone(), torch.nan
    long = start(1, prompt=(5, *PROMPT, *PROMPT))
    step(backend, Chunk(1, 0, 23, blocks(0)), starts=(long,), released=(0,))
    embedding[5] = kept
    long = start(2, prompt=PROMPT + PROMPT)
    chunks = (Chunk(2, 0, 22, blocks(10)), Chunk(3, 0, 11, blocks(20, 4)))
    step(backend, *chunks, starts=(start(3), long), released=(1,))
    output = step(backend, Chunk(2, 22, 1), Chunk(3, 11, 1))  # padded to the longer table
    assert output.token_ids[3] == small.greedy(PROMPT, 2)[1:]


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(0, 0, 12, blocks(0)),  # a token nobody knows
        Chunk(0, 0, 11, blocks(0, 2)),  # a position without a block
        Chunk(0, 0, 11, (0, 1, 128)),  # a block that does not exist
        Chunk(0, 0, 11, (0, 1, -1)),
        Chunk(0, 0, 11, blocks(0), num_drafts=2),  # drafts it never proposed
    ],
)
def test_a_batch_that_breaks_a_promise_is_refused_as_a_whole(small: Any, chunk: Chunk) -> None:
    backend = small.load()
    with pytest.raises(BackendError):
        step(backend, chunk, starts=(start(0),))
    output = step(backend, Chunk(0, 0, 11, blocks(0)), starts=(start(0),), released=(0,))
    assert output.token_ids == {0: small.greedy(PROMPT, 1)}


def test_more_sequences_than_rows_are_refused(small: Any) -> None:
    backend = small.load(max_sequences=1)
    with pytest.raises(BackendError, match="1 of 1 rows"):
        step(backend, starts=(start(0), start(1)))


def test_a_closed_backend_refuses_batches(small: Any) -> None:
    backend = small.load()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        step(backend)


def test_a_late_chunk_of_a_sequence_at_its_limit_is_computed(small: Any) -> None:
    backend = small.load(max_model_len=12)
    step(backend, Chunk(0, 0, 11, blocks(0)), starts=(start(0),))
    assert len(step(backend, Chunk(0, 11, 1)).token_ids[0]) == 1


def test_info_describes_the_kv_memory_it_allocated(small: Any) -> None:
    backend = small.load(dtype="f16")
    (group,) = backend.info.kv_groups
    assert (group.name, group.layers, group.num_kv_heads) == ("full", (0, 1), 2)
    assert (group.key_dim, group.value_dim, group.dtype) == (16, 16, "float16")
    assert group.bytes_per_block == 2 * 2 * 4 * 2 * 16 * 2 == backend.memory.bytes_per_block
    assert backend.info.vocab_size == 128 and backend.info.eos_token_ids == {2}


def test_fingerprints_differ_where_kv_may_not_be_shared(small: Any, make_checkpoint: Any) -> None:
    other = make_checkpoint(initializer_range=0.2)
    loads = [
        small.load(),
        small.load(dtype="bf16"),
        small.load(block_size=8),
        other.load(),
    ]
    assert len({backend.info.fingerprint for backend in loads}) == 4
    assert small.load().info.fingerprint == loads[0].info.fingerprint


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_half_precision_agrees_with_transformers_within_its_grain(small: Any, dtype: str) -> None:
    backend = small.load(dtype=dtype)
    params = replace(GREEDY, logprobs=128)
    output = step(backend, Chunk(0, 0, 11, blocks(0)), starts=(start(0, params),))
    wanted = small.logits(PROMPT)[-1].log_softmax(-1)
    (entry,) = output.logprobs[0]
    got = torch.tensor([value for _, value in sorted(entry.top)])
    assert (got - wanted).abs().max() < (0.5 if dtype == "bf16" else 0.1)


def naive_vector(small: Any, params: PoolingParams, prompt: tuple[int, ...]) -> torch.Tensor:
    with torch.inference_mode():
        hidden = small.model.model(torch.tensor([prompt])).last_hidden_state[0]
    picked = {"mean": hidden.mean(0), "last": hidden[-1], "cls": hidden[0]}[params.pooling]
    picked = picked[: params.dimensions]
    return picked / picked.norm() if params.normalize else picked


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
@pytest.mark.parametrize("more", [{}, {"normalize": False}, {"dimensions": 7}])
@pytest.mark.parametrize("budget", [4, 512])
def test_embeddings_equal_pooled_hidden_states(
    small: Any, pooling: Any, more: dict[str, Any], budget: int
) -> None:
    params = PoolingParams(pooling=pooling, **more)
    engine = Engine(small.load(), SchedulerConfig(max_batch_tokens=budget))
    engine.add(Request("text", PROMPT, SamplingParams(max_tokens=2)))
    for number in range(2):  # the second finds the blocks of the first
        engine.add(Request(f"vector-{number}", PROMPT, params))
    vectors: dict[str, tuple[float, ...]] = {}
    while engine.has_work():
        for output in engine.step():
            assert output.error is None
            vectors[output.request_id] = output.embedding
    for number in range(2):
        got = torch.tensor(vectors[f"vector-{number}"])
        torch.testing.assert_close(got, naive_vector(small, params, PROMPT), atol=1e-4, rtol=1e-4)


def test_pooling_that_misses_the_beginning_fails_alone(small: Any) -> None:
    backend = small.load()
    begun = start(0, PoolingParams("mean"))
    output = step(backend, Chunk(0, 4, 7, blocks(0)), starts=(begun,))
    assert output.failed == {0: "pooling_needs_whole_prompt"} and not output.embeddings


def test_random_requests_give_the_same_tokens_alone_and_together(small: Any) -> None:
    rng = random.Random(11)
    requests = [
        Request(
            str(number),
            tuple(rng.choices(range(3, 128), k=rng.randint(1, 30))),
            SamplingParams(
                temperature=rng.choice([0.0, 0.7, 1.2]),
                top_k=rng.choice([0, 5]),
                top_p=rng.choice([1.0, 0.8]),
                presence_penalty=rng.choice([0.0, 1.0]),
                seed=number,
                max_tokens=20,
            ),
        )
        for number in range(12)
    ]

    def run(wanted: list[Request], **options: Any) -> dict[str, tuple[int, ...]]:
        engine = Engine(small.load(**options), SchedulerConfig(prefix_cache=False))
        for request in wanted:
            engine.add(request)
        tokens: dict[str, tuple[int, ...]] = {}
        while engine.has_work():
            for output in engine.step():
                tokens[output.request_id] = tokens.get(output.request_id, ()) + output.token_ids
        return tokens

    alone: dict[str, tuple[int, ...]] = {}
    for request in requests:
        alone |= run([request])
    assert run(requests) == alone
    assert run(requests, num_blocks=30) == alone
