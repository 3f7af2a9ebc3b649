"""The comparison's bookkeeping, its tiny model, and our runner on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vllm_models.weights.checkpoint import open_checkpoint
from vllm_server.text.tokenizer import Tokenizer

from benchmarks.cpu.cases import CASES, chosen, grouped
from benchmarks.cpu.compare import recorded_reads
from benchmarks.cpu.engines import installed, plan_for, run
from benchmarks.cpu.limits import Rates, work_of
from benchmarks.cpu.runners.plan import Task, Times, measure, plan_from, prompts_of, rates
from benchmarks.cpu.shapes import EXPERTS, SMALL, TINY, model_path, tensors_of
from benchmarks.cpu.table import Cell, is_quiet, latest, markdown, ratios

ABOUT = {"date": "2030-01-02", "machine": "a box", "threads": 2, "command": "compare"}


def row(engine: str, decode: float | None, turn: int = 0, **other: object) -> dict[str, object]:
    return {
        "engine": engine,
        "version": "1",
        "case": "bf16-1",
        "model": "qwen3-0.6b",
        "round": turn,
        "decode_tokens_per_s": decode,
        "prefill_tokens_per_s": 700.0,
        "ready_s": 2.0,
        "first_token_s": 2.5,
        "read": 7e10,
        "products": 9e11,
        "quiet": True,
        "decode_of_limit": decode and decode / 60,
        "prefill_of_limit": 0.7,
        **other,
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def test_a_cell_is_the_median_and_the_spread_of_the_rounds() -> None:
    assert Cell.of([40, 50, 44]) == Cell(44, 10 / 44)
    assert str(Cell.of([40, 50, 44])) == "44 ±11%"


def test_ratios_are_ours_over_each_peer_and_say_which_goals_are_reached() -> None:
    cells = {"vllm-lite": Cell(50, 0), "llama.cpp": Cell(40, 0), "vLLM": Cell(48, 0)}
    shown, said = ratios(cells, {"llama.cpp": 1.1, "vLLM": 1.1})
    assert shown == "1.25x llama.cpp, 1.04x vLLM"
    assert said == "1.1x llama.cpp: yes, 1.1x vLLM: no"


def test_a_goal_against_a_peer_that_did_not_run_is_not_judged() -> None:
    assert ratios({"vllm-lite": Cell(50, 0)}, {"vLLM": 1.1}) == ("", "")
    assert ratios({"vLLM": Cell(50, 0)}, {"vLLM": 1.1}) == ("", "")


def test_the_table_has_medians_over_rounds_and_a_row_per_figure() -> None:
    rows = [row("vllm-lite", 40 + turn, turn) for turn in range(3)]
    rows += [row("llama.cpp", 20, turn, prefill_tokens_per_s=350.0) for turn in range(3)]
    text = markdown(rows, [ABOUT])
    assert "# 2030-01-02, a box" in text
    ends = "2.05x llama.cpp | 1.1x llama.cpp: yes |"
    assert f"| bf16-1 | decode | 41 ±2% | 20 ±0% | 68% | {ends}" in text
    assert "| bf16-1 | prefill | 700 ±0% | 350 ±0% | 70% | 2.00x llama.cpp |  |" in text
    assert "| ready | qwen3-0.6b | 2 ±0% | 2 ±0% |" in text
    assert "| the first token | qwen3-0.6b | 2.5 ±0% | 2.5 ±0% |" in text
    assert "not quiet" not in text


def test_a_case_without_decoding_has_one_row() -> None:
    text = markdown([row("vllm-lite", None)], [ABOUT])
    assert "| decode |" not in text
    assert "| prefill |" in text


def test_a_run_on_a_busy_machine_is_marked(tmp_path: Path) -> None:
    old = tmp_path / "2029-01-01-cpu-compare.jsonl"
    old.write_text(json.dumps({"about": ABOUT}) + "\n" + json.dumps({"read": 70e9}) + "\n")
    assert recorded_reads(tmp_path) == [70e9]
    assert is_quiet(64e9, [70e9], 0.1)
    assert not is_quiet(62e9, [70e9], 0.1)
    assert is_quiet(62e9, [], 0.1)
    assert not is_quiet(70e9, [], 0.9)
    text = markdown([row("vllm-lite", 40, quiet=False), row("vLLM", 40)], [ABOUT])
    assert "**Machine not quiet** in 1 of 2 figures" in text
    assert "| bf16-1 (!) | decode |" in text


def test_a_file_of_several_runs_gives_the_newest_of_each_case() -> None:
    runs = [{**ABOUT, "run": f"{hour}:00", "command": f"at {hour}"} for hour in (10, 11, 12)]
    lines: list[dict[str, object]] = [{"about": about} for about in runs]
    lines += [row("vllm-lite", 1, run="10:00"), row("vllm-lite", 4, run="12:00")]
    lines += [row("vllm-lite", 2, run="11:00"), row("vLLM", 3, case="bf16-8", run="11:00")]
    rows, kept = latest(lines)
    assert [(each["case"], each["decode_tokens_per_s"]) for each in rows] == [
        ("bf16-1", 4),
        ("bf16-8", 3),
    ]
    assert kept == runs[1:]
    assert "    at 11\n    at 12\n" in markdown(rows, kept)


def test_cases_are_chosen_by_pattern_and_share_a_process_by_model() -> None:
    names = [[case.name for case in group] for group in grouped(chosen("bf16-*,q4_k_m-1"))]
    short = ["bf16-1", "bf16-8", "bf16-32", "bf16-prefill"]
    assert sorted(names) == sorted([short, ["bf16-8k-1", "bf16-8k-8"], ["q4_k_m-1"]])
    assert not any(name.startswith("tiny") for name in (case.name for case in chosen("all")))
    with pytest.raises(ValueError, match="no case is called 'bf17-1'"):
        chosen("bf17-1")


def test_a_plan_reaches_its_runner_as_it_was() -> None:
    plan = plan_for(Path("/m"), [CASES["tiny-bf16-2"]], threads=2)
    assert plan_from(json.dumps(plan)) == plan
    assert plan.max_batch == 2


def test_prompts_are_the_same_everywhere_and_begin_differently() -> None:
    task = Task("a case", 3, 50, 1)
    first, again = prompts_of(task, 1000), prompts_of(task, 1000)
    assert first == again
    assert first != prompts_of(task, 1000, "warm")
    assert [len(prompt) for prompt in first] == [50] * 3
    assert len({tuple(prompt[:4]) for prompt in first}) == 3


def test_decoding_is_timed_from_the_moment_all_have_a_token() -> None:
    # The second request reads its prompt for longer, while the first goes on.
    totals = iter([{"a": 1}, {"a": 2}, {"a": 3, "b": 1}, {"a": 4, "b": 2}, {"a": 5, "b": 3}])
    times = measure(lambda: next(totals), batch=2, output=2)
    assert times.tokens == 4
    assert next(totals, None) is None


def test_rates_are_of_the_whole_batch() -> None:
    line = rates(Task("x", 4, 100, 10), Times(2.0, 0.5, 40))
    assert line == {"case": "x", "prefill_tokens_per_s": 200.0, "decode_tokens_per_s": 80.0}
    assert rates(Task("x", 1, 100, 0), Times(2.0))["decode_tokens_per_s"] is None


def test_the_shapes_have_the_sizes_of_their_models() -> None:
    def weights(shape: object) -> int:
        total = 0
        for _, size in tensors_of(shape):  # type: ignore[arg-type]
            count = 1
            for side in size:
                count *= side
            total += count
        return total

    assert weights(SMALL) == 596_049_920
    assert weights(EXPERTS) > 3_000_000_000
    assert SMALL.kv_bytes_per_token == 114_688


def test_the_limit_counts_what_a_step_must_read(cache: Path) -> None:
    work = work_of(TINY, model_path(cache, TINY, "bf16"))
    total = sum(tensor.num_bytes for tensor in open_checkpoint(cache / "tiny").tensors())
    assert work.body_bytes + work.head_bytes == total
    task = Task("x", 1, 10, 4)
    read = total + 12 * TINY.kv_bytes_per_token
    assert work.decode(task, Rates(1e9, 1e30)) == pytest.approx(1e9 / read)
    assert work.decode(task._replace(batch=8), Rates(1e30, 1e9)) == pytest.approx(
        1e9 / (2 * (work.body + work.head))
    )
    assert work.prefill(Rates(1, 1e9)) == pytest.approx(1e9 / (2 * work.body))


def test_experts_that_no_token_takes_are_not_read(cache: Path) -> None:
    work = work_of(TINY, model_path(cache, TINY, "bf16"))
    sparse = work._replace(expert_bytes=1 << 20, share=0.25, kv_bytes=0)
    alone, two = (sparse.decode(Task("x", batch, 8, 2), Rates(1e9, 1e30)) for batch in (1, 2))
    rest = work.body_bytes + work.head_bytes
    assert alone == pytest.approx(1e9 / (rest + (1 << 18)))
    assert two == pytest.approx(2e9 / (rest + (1 << 20) * 0.4375))


def test_the_synthetic_vocabulary_reads_text_back(cache: Path) -> None:
    folder, file = (model_path(cache, TINY, weights) for weights in ("bf16", "q8_0"))
    for path in (folder, file):
        tokenizer = Tokenizer(path)
        ids = tokenizer.encode("Grüße, 世界!\n")
        assert tokenizer.decode(ids) == "Grüße, 世界!\n"
        assert tokenizer.eos_token_id == TINY["vocab_size"] - 1


def test_our_runner_measures_a_folder_and_a_gguf_file(cache: Path, tmp_path: Path) -> None:
    ours = installed(tmp_path)[0]
    assert ours.name == "vllm-lite"
    for name in ("tiny-bf16-2", "tiny-q8_0-2"):
        case = CASES[name]
        [line] = run(ours, plan_for(model_path(cache, TINY, case.weights), [case], threads=1))
        assert (line["engine"], line["case"]) == ("vllm-lite", name)
        assert line["decode_tokens_per_s"] > 0
        assert line["prefill_tokens_per_s"] > 0
        assert 0 < line["ready_s"] < line["first_token_s"] < 60


def test_a_runner_that_fails_says_why(tmp_path: Path) -> None:
    ours = installed(tmp_path)[0]
    with pytest.raises(RuntimeError, match=r"(?s)vllm-lite ended with 1.*nowhere"):
        run(ours, plan_for(tmp_path / "nowhere", [CASES["tiny-bf16-2"]], threads=1))


def test_peers_are_those_whose_environments_are_there(tmp_path: Path) -> None:
    assert not {"llama.cpp", "vLLM"} & {engine.name for engine in installed(tmp_path)}
    python = tmp_path / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    found = {engine.name: engine for engine in installed(tmp_path)}
    assert found["vLLM"].python == python
    assert found["vLLM"].serves(CASES["bf16-8"])
    assert not found["vLLM"].serves(CASES["q4_k_m-1"])
