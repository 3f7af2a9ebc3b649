"""What a start says: figures, warnings, progress."""

import sys

import pytest
from vllm_models.options import LoadProgress
from vllm_server import progress
from vllm_server.banner import banner, exposure_warning
from vllm_server.config import Settings, load
from vllm_server.config.flags import FlagParser
from vllm_server.self_check import Findings


def settings(*words: str) -> Settings:
    return load(FlagParser("serve", "").parse(words)[1], environ={}).settings


class Memory:
    weight_bytes, dtype, device, max_model_len = 3 << 20, "bfloat16", "cpu", 512
    num_blocks, block_size, num_tokens, kv_bytes, max_concurrency = 64, 16, 1024, 5 << 20, 2.0
    kv_dtype = "bfloat16"


def test_the_banner_has_every_figure_of_the_start():
    told = "\n".join(
        banner(
            *(settings(), "demo", Memory(), Findings()),
            *({"load": 1.0, "warm-up": 0.25}, ["http://h:1"]),
        )
    )
    for part in (
        "serves demo",
        "demonstration model",
        "--model PATH_OR_HUB_ID",
        "3.0 MB of weights, bfloat16 on cpu",
        "64 blocks x 16 tokens = 1024 tokens of bfloat16, 5.0 MB; 2.0 sequences of full length",
        "Results do not depend on the batch",
        "1.25 s (load 1.00 s, warm-up 0.25 s)",
        "http://h:1",
    ):
        assert part in told
    real = "\n".join(banner(settings("--model", "a/b"), "a/b", Memory(), Findings(), {}, []))
    assert "demonstration" not in real


@pytest.mark.parametrize(
    ("words", "warns"),
    [
        ([], True),
        (["--host", "127.0.0.1"], False),
        (["--host", "::1"], False),
        (["--host", "localhost"], False),
        (["--uds", "/tmp/x"], False),
        (["--api-key", "k"], False),
    ],
)
def test_only_an_open_door_to_strangers_is_warned_about(words, warns):
    assert (exposure_warning(settings(*words)) is not None) is warns


def test_progress_is_a_line_per_tenth_and_times_belong_to_their_stage(caplog):
    watch = progress.Stopwatch(progress.ProgressLines())
    with caplog.at_level("INFO", "vllm_server"):
        for i in range(101):
            watch(LoadProgress("load", i / 100))
        watch(LoadProgress("warm-up", 1.0, "done"))
    watch.stop()
    assert len(caplog.messages) == 12
    assert list(watch.seconds) == ["import", "load", "warm-up"]


def test_progress_bars_leave_the_terminal_clean(capsys):
    with progress.ProgressBars(sys.stderr) as bars:
        bars(LoadProgress("load", 0.5, "a file"))
        bars(LoadProgress("load", 1.0))
    assert "Traceback" not in capsys.readouterr().err
