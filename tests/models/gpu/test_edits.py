"""Changes to logits, against those of the CPU."""

from __future__ import annotations

import random

import pytest
import torch
from vllm_models.gpu import edit_kernels
from vllm_models.gpu import edits as gpu
from vllm_models.runner.edits import Target, apply_edits, compile_edits
from vllm_models.runner.rows import Row
from vllm_traits import SamplingParams

EOS = frozenset({2})
CPU = torch.device("cpu")
CAPACITY = 1500
KINDS = {
    "none": SamplingParams(),
    "bias": SamplingParams(logit_bias=((3, 2.5), (0, -100.0), (3, 1.0))),
    "allowed": SamplingParams(allowed_token_ids=(1, 5, 30, 64)),
    "nothing allowed": SamplingParams(allowed_token_ids=()),
    "bad": SamplingParams(bad_token_ids=((4,), (6, 7), (6, 6, 9), (6, 1, 9))),
    "early": SamplingParams(min_tokens=10, stop_token_ids=frozenset({8, 9})),
    "penalties": SamplingParams(
        repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=-0.4
    ),
    "repetition": SamplingParams(repetition_penalty=0.8),
    "all": SamplingParams(
        allowed_token_ids=tuple(range(0, 60, 2)),
        logit_bias=((4, 1.5), (7, 2.0)),
        bad_token_ids=((4,), (6, 8)),
        min_tokens=3,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
    ),
}


class Table:
    """Sequences with random texts over few tokens; the state holds them in reverse order."""

    def __init__(self, params: list[SamplingParams], vocab_size: int, device, longest=40) -> None:
        rng = random.Random(0)
        self.params, self.device, self.vocab_size = params, device, vocab_size
        self.tokens = torch.full((len(params), CAPACITY), -1, dtype=torch.int32)
        self.counts = [(rng.randint(1, longest), rng.randint(0, longest)) for _ in params]
        for index, counts in enumerate(self.counts):
            known = rng.choices(range(min(vocab_size, 12)), k=sum(counts))
            self.tokens[index, : len(known)] = torch.tensor(known)
        generator = torch.Generator().manual_seed(1)
        self.logits = torch.randn(len(params), vocab_size, generator=generator) * 3

    def end_with(self, index: int, *tail: int) -> None:
        """Replace the last tokens of a text."""
        length = sum(self.counts[index])
        self.tokens[index, length - len(tail) : length] = torch.tensor(tail)

    def by_cpu(self, masks: dict[int, bytes]) -> torch.Tensor:
        targets = []
        for index, (p, counts) in enumerate(zip(self.params, self.counts, strict=True)):
            edits = compile_edits(p, EOS, self.vocab_size, CPU)
            row = Row(index, p, 0, counts[0], sum(counts), edits=edits)
            targets.append(Target(index, row, sum(counts)))
        logits = self.logits.clone()
        apply_edits(logits, targets, self.tokens.long().clamp(min=0), masks)
        return logits

    def batch(self) -> gpu.EditBatch | None:
        last = len(self.params) - 1
        compiled = (gpu.compile_row(p, EOS, self.vocab_size, self.device) for p in self.params)
        return gpu.EditBatch.of([(i, last - i, e) for i, e in enumerate(compiled) if e])

    def by_gpu(self, masks: dict[int, bytes], batch: gpu.EditBatch | None) -> torch.Tensor:
        logits = self.logits.to(self.device, copy=True)
        numbers = (
            torch.tensor(values, dtype=torch.int32, device=self.device)
            for values in ([*range(len(self.params))][::-1], [sum(c) for c in self.counts])
        )
        prompts = torch.tensor([c[0] for c in self.counts[::-1]], dtype=torch.int32)
        tokens = self.tokens.flip(0).to(self.device)
        gpu.apply(logits, batch, *numbers, tokens, prompts.to(self.device), masks)
        return logits.cpu()

    def check(self, masks: dict[int, bytes] | None = None) -> None:
        masks = masks or {}
        assert torch.allclose(
            self.by_gpu(masks, self.batch()), self.by_cpu(masks), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("vocab_size", [65, 1000, 5000])
def test_every_kind_of_edit_is_the_one_of_the_cpu(device, vocab_size) -> None:
    table = Table(list(KINDS.values()) * 2, vocab_size, device)
    masks = {3: b"\xff\x01", 7: bytes(range(256)) * 3, 0: b"\x80"}
    table.check(masks)
    table.check()


def test_a_bad_sequence_is_completed_by_no_row_whose_text_ends_with_its_beginning(device) -> None:
    table = Table([KINDS["bad"]] * 4, 70, device)
    table.end_with(0, 5, 6)
    table.end_with(1, 6, 6)
    table.end_with(2, 6, 1)
    table.end_with(3, 1, 1)
    forbidden = [row.isinf().nonzero()[:, 0].tolist() for row in table.by_gpu({}, table.batch())]
    assert forbidden == [[4, 7], [4, 7, 9], [4, 9], [4]]
    table.check()


def test_a_bad_sequence_longer_than_the_text_forbids_nothing(device) -> None:
    table = Table([SamplingParams(bad_token_ids=((0, 0, 0, 5),))], 10, device, longest=1)
    table.counts = [(2, 0)]
    table.tokens[:] = 0
    assert bool(table.by_gpu({}, table.batch()).isfinite().all())


def test_stops_are_forbidden_up_to_min_tokens_and_not_after(device) -> None:
    table = Table([KINDS["early"]] * 3, 20, device)
    table.counts = [(5, 0), (5, 9), (5, 10)]
    forbidden = [row.isinf().nonzero()[:, 0].tolist() for row in table.by_gpu({}, table.batch())]
    assert forbidden == [[2, 8, 9], [2, 8, 9], []]


def test_texts_of_several_tiles_are_counted_once(device) -> None:
    table = Table([KINDS["penalties"], KINDS["repetition"]], 3000, device)
    table.counts = [(700, 800), (1400, 100)]
    table.tokens[:] = torch.randint(0, 900, table.tokens.shape, dtype=torch.int32)
    table.tokens[:, ::3] = 11
    table.check()


def test_a_batch_serves_step_after_step(device) -> None:
    table = Table([KINDS["penalties"], KINDS["all"]] * 20, 64, device)
    batch = table.batch()
    first = table.by_gpu({}, batch)
    assert torch.equal(first, table.by_gpu({}, batch))
    assert torch.allclose(first, table.by_cpu({}), rtol=1e-6, atol=1e-6)
    assert batch is not None and batch.penalised is not None
    assert not bool(batch.penalised.counts.any())


def test_bfloat16_logits_are_changed_in_place(device) -> None:
    table = Table(list(KINDS.values()), 300, device)
    table.logits = table.logits.bfloat16()
    found = table.by_gpu({}, table.batch())
    table.logits = table.logits.float()
    wanted = table.by_cpu({})
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.isinf(), wanted.isinf())
    finite = wanted.isfinite()
    assert torch.allclose(found.float()[finite], wanted[finite], rtol=1e-2, atol=1e-2)


def test_a_row_without_edits_is_not_part_of_a_batch(device) -> None:
    assert gpu.compile_row(SamplingParams(), EOS, 10, device) is None
    assert gpu.compile_row(SamplingParams(stop_token_ids=EOS), EOS, 10, device) is None
    assert gpu.EditBatch.of([]) is None


def test_every_form_is_named_once() -> None:
    names = [variant.name for variant in edit_kernels.variants()]
    assert len(names) == len(set(names)) > 0
