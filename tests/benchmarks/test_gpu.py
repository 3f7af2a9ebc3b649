"""The GPU benchmarks: arithmetic, requests, deadlines, tables, and a run of each part on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from vllm_models.gpu.launch import mode

from benchmarks.cpu.shapes import SMALL, TINY, Shape
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import engine, kernels, products, serving, table
from benchmarks.gpu.attention import Heads, Step
from benchmarks.gpu.case import Call, Case, Work, figures
from benchmarks.gpu.ceilings import TINY as TINY_EXTENT
from benchmarks.gpu.ceilings import Meter
from benchmarks.gpu.engine import Setup, Steady
from benchmarks.gpu.models import EXPERTS30, LLAMA8, TINY_EXPERTS, RandomCheckpoint, load
from benchmarks.gpu.requests import long_outputs, nano, within
from benchmarks.gpu.roofline import (
    Ceilings,
    Size,
    decode_contexts,
    prompt_seconds,
    run_seconds,
    step_seconds,
)
from benchmarks.gpu.stages import TIME_IS_UP, Book, Clock, Stage

CPU = torch.device("cpu")
H200 = Ceilings(4.3e12, 790e12, 1.4e15)


def test_the_bench_has_the_lengths_that_others_measured() -> None:
    work = nano()
    prompts = [len(ids) for ids in work.prompts]
    assert (len(prompts), sum(prompts), work.num_output_tokens) == (256, 142_827, 133_966)
    contexts = list(decode_contexts(prompts, work.outputs))
    assert len(contexts) == 1023
    assert max(map(sum, contexts)) == 169_057


def test_the_limit_of_the_bench_is_that_of_the_arithmetic() -> None:
    size, work = Size.of(SMALL.fields), nano()
    prompts = [len(ids) for ids in work.prompts]
    seconds = run_seconds(size, prompts, work.outputs, H200)
    assert seconds == pytest.approx(3.72, abs=0.01)
    assert work.num_output_tokens / seconds == pytest.approx(36_019, rel=1e-4)
    assert run_seconds(size, prompts, work.outputs, H200, is_8_bit=True) < 0.6 * seconds
    short = long_outputs()
    again = run_seconds(size, [16] * 256, short.outputs, H200)
    assert short.num_output_tokens / again == pytest.approx(63_553, rel=0.01)


@pytest.mark.parametrize(
    ("weights", "batch", "milliseconds"),
    [
        ("bf16", 1, 3.52),
        ("bf16", 256, 12.85),
        ("fp8", 1, 1.90),
        ("fp8", 256, 10.88),
        ("w4", 32, 2.08),
    ],
)
def test_the_limit_of_a_step_is_weights_or_products_and_kv(
    weights: str, batch: int, milliseconds: float
) -> None:
    size = Size.of(LLAMA8.fields)
    found = step_seconds(size, weights, [1024] * batch, H200)
    assert found * 1e3 == pytest.approx(milliseconds, abs=0.006)


def test_experts_are_streamed_as_far_as_rows_touch_them() -> None:
    size = Size.of(EXPERTS30.fields)
    assert size.touched(1) == pytest.approx(8)
    assert size.touched(256) == pytest.approx(128, abs=0.01)
    assert size.weight_bytes("bf16", 1) == pytest.approx(6.08e9, rel=0.01)
    assert step_seconds(size, "bf16", [1024] * 64, H200) == pytest.approx(15.34e-3, rel=0.01)
    assert prompt_seconds(size, [1000], H200) > 1000 * 2 * size.active / H200.products


def test_attention_counts_what_a_window_lets_it_see() -> None:
    plain = Step(Heads(16, 8), 1, (1000, 1000))
    assert plain.work.num_bytes == 2 * 2000 * 8 * 256 + 4 * 2 * 16 * 128
    assert plain.work.operations == 4 * 2000 * 16 * 128
    assert plain._replace(window=99).work.operations == 4 * 200 * 16 * 128
    assert plain._replace(is_8_bit=True).work.num_bytes < 0.53 * plain.work.num_bytes


class Time:
    """A clock that is moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_stage_ends_with_its_time_and_the_next_one_begins(tmp_path: Path) -> None:
    time = Time()

    def slow(clock: Clock):
        for number in range(9):
            clock.check()
            time.now += 4
            yield {"number": number}

    book = Book(tmp_path / "rows.jsonl", {"run": "1"})
    book.run(
        [Stage("slow", 10, slow), Stage("next", 5, lambda _: [{"number": 1.5}])], Clock(99, time)
    )
    lines = [json.loads(line) for line in book.path.read_text().splitlines()]
    rows = [line for line in lines if "about" not in line and "seconds" not in line]
    assert [row.get("number") for row in rows] == [0, 1, 2, None, 1.5]
    assert rows[3]["cut"] == TIME_IS_UP


def test_a_stage_that_fails_says_why_and_keeps_its_rows(tmp_path: Path) -> None:
    def failing(_: Clock):
        yield {"number": 1}
        raise RuntimeError("out of memory")

    book = Book(tmp_path / "rows.jsonl", {"run": "1"})
    book.run([Stage("failing", 10, failing)], Clock(99))
    rows = [json.loads(line) for line in book.path.read_text().splitlines()][1:]
    assert rows[0]["number"] == 1
    assert "out of memory" in rows[1]["failed"]


def about(run: str) -> dict[str, str]:
    names = ("date", "device", "torch", "triton", "cuda", "driver")
    return {"run": run, "command": f"run {run}", **dict.fromkeys(names, "x")}


def test_the_document_has_the_newest_rows_of_each_stage(tmp_path: Path) -> None:
    lines = [
        {"about": about("1")},
        {"run": "1", "stage": "kept", "kernel": "gate", "of limit": 0.81},
        {"run": "1", "stage": "anew", "tokens/s": 1234.5},
        {"about": about("2")},
        {"run": "2", "stage": "anew", "tokens/s": 2345.6},
        {"run": "2", "stage": "anew", "cut": "time is up"},
    ]
    path = tmp_path / "2026-01-01-gpu-x-kernels.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    [made] = table.write([path])
    text = made.read_text()
    assert made.name == "2026-01-01-gpu-x.md"
    assert "| gate | 81% |" in text
    assert "2,346" in text
    assert "1,234" not in text
    assert "Not all of it: time is up." in text


def test_a_wrong_kernel_has_no_time() -> None:
    wrong = Case("wrong", "", Work(1), lambda: Call(lambda: torch.ones(2), lambda: torch.zeros(2)))
    poisoned = wrong._replace(
        make=lambda: Call(lambda: torch.full((2,), torch.nan), lambda: torch.zeros(2))
    )
    for row in figures([wrong, poisoned], CPU, H200):
        assert "us" not in row
        assert "wrong" in row["fault"]


def test_kernels_are_checked_and_timed_in_the_interpreter() -> None:
    cases = [*products.pointwise_cases(CPU, True), *products.sampler_cases(CPU, True)][:4]
    for row in figures(cases, CPU, H200):
        assert row.get("fault") is None, row
        assert row["us"] > 0
        assert row["error"] <= 0.02


def test_ceilings_are_measured() -> None:
    meter = Meter(CPU, TINY_EXTENT._replace(layers=()))
    rows = {row["ceiling"]: row for row in meter.figures() if "ceiling" in row}
    assert {"copy", "read", "bf16 products", "kernel in a graph"} <= rows.keys()
    assert meter.ceilings.copy == pytest.approx(rows["copy"]["rate"] * 1e12)


@pytest.mark.parametrize("shape", [TINY, TINY_EXPERTS], ids=lambda shape: shape.name)
@pytest.mark.parametrize("weights", ["bf16", "fp8", "w4"])
def test_random_weights_fill_a_model_without_a_file(shape: Shape, weights: str) -> None:
    backend = load(
        shape, weights, CPU, num_blocks=8, max_model_len=64, max_sequences=2, max_batch_tokens=32
    )
    assert backend.info.vocab_size == shape["vocab_size"]
    backend.close()


def test_random_weights_are_the_same_each_time() -> None:
    first, second = (list(RandomCheckpoint(TINY, "bf16", CPU).tensors()) for _ in range(2))
    assert torch.equal(first[0].read(), second[0].read())
    assert not torch.equal(first[2].read(), first[3].read()[: len(first[2].read())])


def test_the_engine_is_measured_on_a_tiny_model() -> None:
    works = (within(nano(4, 3, 6), 400), Steady(2, 8, 3))
    setup = Setup("tiny", 60, TINY, "bf16", works, {}, True, 2)
    meter = Meter(CPU, TINY_EXTENT._replace(layers=()))
    loaded, run, steady = engine.measure(setup, CPU, meter, Clock(60))
    assert loaded["weights GB"] > 0
    assert run["tokens"] == sum(works[0].outputs)
    assert run["tokens/s"] > 0
    prompts = [len(ids) for ids in works[0].prompts]
    limit = run_seconds(Size.of(TINY.fields), prompts, works[0].outputs, meter.ceilings)
    assert run["of limit"] == pytest.approx(limit / run["s"])
    assert steady["batch"] == 2
    assert steady["tokens/s"] * steady["ms/step"] == pytest.approx(2000)


def test_the_engine_gives_up_when_time_is_up() -> None:
    setup = Setup("tiny", 60, TINY, "bf16", (Steady(2, 8, 3),))
    meter = Meter(CPU, TINY_EXTENT._replace(layers=()))
    rows = engine.measure(setup, CPU, meter, Clock(0))
    assert "weights GB" in next(rows)
    with pytest.raises(TimeoutError):
        next(rows)


@pytest.mark.parametrize("module", [kernels, engine, serving])
def test_all_stages_fit_into_nine_minutes(module: ModuleType) -> None:
    stages = list(module.stages(CPU, False))
    assert len({stage.name for stage in stages}) == len(stages)
    assert sum(stage.seconds for stage in stages) <= command.SECONDS < 540


def test_a_profile_tells_kernels_from_gaps() -> None:
    spans = [serving.Span("few", 100.0, 2), serving.Span("most", 300.0, 4)]
    summary, *rows = serving.profile_rows(spans, 0.001, 2, most=1)
    assert summary["share in kernels"] == pytest.approx(0.4)
    assert summary["kernels/step"] == 3
    assert [row["kernel"] for row in rows] == ["most"]
    assert rows[0]["us/step"] == 150


def test_serving_is_skipped_where_packages_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_PACKAGES", ("no_such_package",))
    [row] = next(iter(serving.stages(CPU, True))).figures(Clock(9))
    assert "no_such_package" in row["skipped"]


@pytest.mark.parametrize("part", ["kernels", "engine", "serving"])
def test_without_a_gpu_a_command_says_so(
    part: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        command.main([part])
    assert ended.value.code == 2
    assert command.NO_GPU in capsys.readouterr().err


def test_a_command_writes_rows_and_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode()  # is decided once, and not by what follows
    monkeypatch.setenv("VLLM_LITE_TRITON", "interpret")  # as --tiny does, and undone after
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    words = ["kernels", "--tiny", "--stages", "norms and gates", "--results", str(tmp_path)]
    command.main(words)
    [document] = tmp_path.glob("*.md")
    assert "rms_norm" in document.read_text()
    with pytest.raises(SystemExit):
        command.main([*words[:3], "nothing", *words[4:]])
