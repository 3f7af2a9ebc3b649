"""The runner of a device, batch by batch and under an engine, against the runner of the CPU."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm_core import Engine, SchedulerConfig
from vllm_core.testing import DelayedBackend
from vllm_models.runner.device.decode import bucket_sizes
from vllm_models.runner.device.runner import DeviceRunner
from vllm_models.runner.device.upload import Upload
from vllm_traits import Batch, BatchOutput, Chunk, PoolingParams, Request, SamplingParams, Start

GREEDY = SamplingParams(temperature=0.0)
PROMPT = tuple(random.Random(3).choices(range(3, 128), k=11))


def load(small: Any, **options: Any) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    defaults = {"block_size": 16, "max_sequences": 3, "num_blocks": 40, "device": device}
    backend = small.load(**(defaults | options))
    assert isinstance(backend._runner, DeviceRunner)
    return backend


def step(backend: Any, *chunks: Chunk, **batch: Any) -> BatchOutput:
    in_flight = backend.forward(Batch(chunks, **batch))
    in_flight.sample()
    return in_flight.result()


def start(seq_id: int = 0, params: Any = GREEDY, prompt: tuple[int, ...] = PROMPT) -> Start:
    return Start(seq_id, prompt, params, seed=seq_id, num_prompt_tokens=len(prompt))


@pytest.mark.parametrize("max_sequences", [1, 3, 4, 31, 256, 300, 2000])
def test_buckets_hold_every_number_of_sequences_up_to_1024(max_sequences: int) -> None:
    sizes = bucket_sizes(max_sequences)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == min(max_sequences, 1024)


def test_an_upload_brings_arrays_apart_again(device: torch.device) -> None:
    import numpy as np

    upload = Upload(device)
    arrays = [np.arange(n, dtype=np.int32) + n for n in (3, 0, 70_000, 1)]
    for _ in range(6):  # more often than there are buffers
        sent = upload.send(arrays)
        assert [t.tolist() for t in sent] == [a.tolist() for a in arrays]


def test_a_step_is_launched_before_the_last_one_is_read(small: Any, triton_path: None) -> None:
    backend = load(small)
    first = backend.forward(Batch((Chunk(0, 0, 11, (4,)),), (start(),)))
    later = [backend.forward(Batch((Chunk(0, 11 + i, 1),))) for i in range(3)]
    tokens = [each.result().token_ids[0][0] for each in (first, *later)]
    assert tuple(tokens) == small.greedy(PROMPT, 4)


def test_buckets_and_walking_through_the_layers_give_the_same_tokens(
    small: Any, triton_path: None
) -> None:
    found = []
    for eager in (False, True):
        backend = load(small, enforce_eager=eager)
        starts = (start(0), start(1, replace(GREEDY, temperature=0.9, top_k=20), PROMPT[:5]))
        outputs = [step(backend, Chunk(0, 0, 11, (4,)), Chunk(1, 0, 5, (7,)), starts=starts)]
        outputs += [step(backend, Chunk(0, 11 + i, 1), Chunk(1, 5 + i, 1)) for i in range(3)]
        found.append([output.token_ids for output in outputs])
    assert found[0] == found[1]


def test_a_steady_decode_sends_nothing_to_the_device(
    small: Any, triton_path: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = load(small)
    step(backend, Chunk(0, 0, 11, (4, 5)), starts=(start(),))
    step(backend, Chunk(0, 11, 1))
    monkeypatch.setattr(Upload, "send", lambda *_: pytest.fail("something was sent"))
    tokens = [step(backend, Chunk(0, 12 + i, 1)).token_ids[0][0] for i in range(2)]
    assert tuple(tokens) == small.greedy(PROMPT, 4)[2:]


@pytest.mark.parametrize("num_right", [0, 2, 3])
def test_drafts_are_accepted_up_to_the_first_wrong_one(
    small: Any, triton_path: None, num_right: int
) -> None:
    backend = load(small)
    truth = small.greedy(PROMPT, 7)
    step(backend, Chunk(0, 0, 11, (4, 5)), starts=(start(),))
    drafts = tuple(t if i < num_right else t ^ 1 for i, t in enumerate(truth[1:4]))
    verifying = backend.forward(Batch((Chunk(0, 11, 4, num_drafts=3, draft_ids=drafts),)))
    known = 1 + num_right + 1
    following = backend.forward(Batch((Chunk(0, 15, 1),)))  # planned as if all were right
    assert verifying.result().token_ids[0] == truth[1:known]
    assert following.result().token_ids[0] == truth[known : known + 1]


def test_masked_sequences_wait_for_their_masks_in_a_bucket_too(
    small: Any, triton_path: None
) -> None:
    backend = load(small)
    chunks = (Chunk(0, 0, 11, (4,), masked=True), Chunk(1, 0, 11, (5,)))
    in_flight = backend.forward(Batch(chunks, (start(0), start(1))))
    assert not in_flight.done()
    in_flight.sample({0: (1 << 77).to_bytes(16, "little")})
    assert in_flight.result().token_ids == {0: (77,), 1: small.greedy(PROMPT, 1)}
    decode = backend.forward(Batch((Chunk(0, 11, 1, masked=True), Chunk(1, 11, 1))))
    decode.sample({0: (1 << 5).to_bytes(16, "little")})
    assert decode.result().token_ids == {0: (5,), 1: small.greedy(PROMPT, 2)[1:]}
    after = step(backend, Chunk(0, 12, 1), Chunk(1, 12, 1)).token_ids
    assert after == {0: small.greedy((*PROMPT, 77, 5), 1), 1: small.greedy(PROMPT, 3)[2:]}


def test_wrong_numbers_fail_their_sequence_alone_and_reach_nobody_else(
    small: Any, triton_path: None
) -> None:
    backend = load(small)
    embedding = backend._runner.model.model.embed_tokens.weight
    kept, embedding[5] = embedding[5].clone(), torch.nan
    poisoned = start(0, prompt=(5, *PROMPT, *PROMPT))
    chunks = (Chunk(0, 0, 23, (4, 5)), Chunk(1, 0, 11, (6,)))
    output = step(backend, *chunks, starts=(poisoned, start(1)))
    assert output.failed == {0: "non_finite_logits"}
    assert output.token_ids == {1: small.greedy(PROMPT, 1)}
    embedding[5] = kept
    output = step(backend, Chunk(2, 0, 11, (4,)), starts=(start(2),), released=(0,))
    tokens = output.token_ids[2] + step(backend, Chunk(2, 11, 1)).token_ids[2]
    assert tokens == small.greedy(PROMPT, 2)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_equal_those_of_the_cpu(small: Any, triton_path: None, pooling: str) -> None:
    params = PoolingParams(pooling=pooling)
    chunks = (Chunk(0, 0, 6, (4,), sample=False), Chunk(0, 6, 5))
    backend = load(small)
    step(backend, chunks[0], starts=(start(0, params),))
    found = step(backend, chunks[1]).embeddings[0]
    hidden = small.model.model(torch.tensor([PROMPT])).last_hidden_state[0]
    wanted = hidden.mean(0) if pooling == "mean" else hidden[-1]
    wanted = torch.nn.functional.normalize(wanted, dim=0)
    torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-4, rtol=1e-4)


EDITED = SamplingParams(
    temperature=1.0,
    top_p=0.9,
    seed=4,
    max_tokens=6,
    ignore_eos=True,
    frequency_penalty=0.7,
    repetition_penalty=1.3,
    logit_bias=((9, 2.0), (40, -1.0)),
    bad_token_ids=((17,), (20, 21)),
    logprobs=3,
)


def run(backend: Any, overlap: bool) -> dict[str, tuple[Any, ...]]:
    """Tokens and rounded log-probabilities of an edited and a plain request, side by side."""
    engine = Engine(backend, SchedulerConfig(overlap=overlap, max_batch_tokens=16))
    engine.add(Request("edited", PROMPT, EDITED))
    plain = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    engine.add(Request("plain", PROMPT[:7], plain))
    found: dict[str, tuple[Any, ...]] = {"edited": (), "plain": ()}
    while engine.has_work():
        for output in engine.step():
            assert output.error is None, output
            entries = [(e.token_id, e.rank, round(e.logprob, 3)) for e in output.logprobs if e]
            found[output.request_id] += tuple(entries or output.token_ids)
    return found


@pytest.mark.parametrize("overlap", [True, False])
def test_edited_requests_sample_as_on_the_cpu(
    small: Any, torch_products: None, overlap: bool, request: pytest.FixtureRequest
) -> None:
    expected = run(small.load(), overlap)
    request.getfixturevalue("triton_path")
    assert run(load(small), overlap) == expected


def logprobs_of(backend: Any) -> torch.Tensor:
    """Of a prompt and some decoded tokens [positions, V], computed in chunks."""
    params = replace(EDITED, temperature=0.0, prompt_logprobs=128, logprobs=128)
    plain = replace(params, frequency_penalty=0.0, repetition_penalty=1.0, logit_bias=())
    engine = Engine(backend, SchedulerConfig(max_batch_tokens=16))
    engine.add(Request("only", PROMPT * 2, replace(plain, bad_token_ids=())))
    rows: list[torch.Tensor] = []
    while engine.has_work():
        for output in engine.step():
            assert output.error is None, output
            for entry in (*output.prompt_logprobs, *output.logprobs):
                if entry is not None:
                    ids, values = zip(*sorted(entry.top), strict=True)
                    assert ids == tuple(range(128))
                    rows.append(torch.tensor(values))
    return torch.stack(rows)


def test_a_cache_of_eight_bits_rounds_as_on_the_cpu(
    small: Any, torch_products: None, request: pytest.FixtureRequest
) -> None:
    exact = logprobs_of(small.load())
    expected = logprobs_of(small.load(kv_cache_dtype="int8"))
    request.getfixturevalue("triton_path")
    found = logprobs_of(load(small, kv_cache_dtype="int8"))
    assert len(found) == 21 + 6
    assert (expected - exact).abs().max() > 1e-3  # it rounds at all
    assert (found - expected).abs().max() < 1e-3


@pytest.mark.parametrize("delay", [1, 3])
def test_late_batches_and_faults_leave_the_tokens_as_they_are(
    small: Any, triton_path: None, delay: int
) -> None:
    late = DelayedBackend(load(small), delay, fail_forward=(3,), fail_result=(6,))
    engine = Engine(late, SchedulerConfig(max_batch_tokens=16))
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    engine.add(Request("early", PROMPT, params))
    found: dict[str, tuple[int, ...]] = {}
    while engine.has_work():
        for output in engine.step():
            assert output.error is None, output
            found[output.request_id] = found.get(output.request_id, ()) + output.token_ids
    assert late.num_faults == 2
    assert found == {"early": small.greedy(PROMPT, 6)}


def test_the_start_tells_how_attention_reads_its_blocks(small: Any, triton_path: None) -> None:
    [note] = load(small, enforce_eager=True).memory.notes
    assert note == "Decode attention reads tiles of 256 positions (heads of 16)."
