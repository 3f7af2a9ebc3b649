"""From settings to what the model and the scheduler are told."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from vllm_core import SchedulerConfig
from vllm_models import BackendOptions
from vllm_server import launch
from vllm_server.config import EngineSettings, SamplingSettings, Settings, load
from vllm_server.config.flags import FlagParser
from vllm_traits import ModelError


def settings(*words: str) -> Settings:
    return load(FlagParser("serve", "").parse(words)[1], environ={}).settings


def test_nothing_heavy_is_imported_before_the_server_answers():
    code = "import sys, vllm_server.serve, vllm_server.local; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], ("vllm-lite-demo",)),
        (["--model", "Qwen/Qwen3-0.6B"], ("Qwen/Qwen3-0.6B",)),
        (["--w", "."], (Path.cwd().name,)),
        (["--model", "some/where/tiny-Q4_K_M.gguf"], ("tiny-Q4_K_M",)),
        (["--f", "tiny-00001-of-00002.gguf"], ("tiny",)),
        (["--w", ".", "--f", "tiny.gguf"], ("tiny",)),
        (["--m", "own/model", "--f", "tiny.gguf"], ("own/model",)),
        (["--served-model-name", "a", "--served-model-name", "b"], ("a", "b")),
    ],
)
def test_the_model_is_called_as_the_operator_says_or_as_it_was_named(words, names):
    assert launch.model_names(settings(*words)) == names


def test_defaults_depend_on_the_device_and_explicit_values_win():
    assert launch.backend_options(settings("--cpu").engine, Path()) == BackendOptions(
        model=Path(), device="cpu", block_size=16, max_sequences=32, max_batch_tokens=512
    )
    words = (
        *("--cpu", "--block-size", "32", "--max-num-seqs", "3", "--num-kv-blocks", "9"),
        *("--max-num-batched-tokens", "64", "--max-model-len", "100", "--dtype", "half"),
        *("--gpu-memory-utilization", "0.5", "--kv-cache-memory", "1M"),
    )
    assert launch.backend_options(settings(*words).engine, Path()) == BackendOptions(
        model=Path(),
        dtype="half",
        device="cpu",
        num_blocks=9,
        block_size=32,
        memory_fraction=0.5,
        kv_cache_memory=1 << 20,
        max_model_len=100,
        max_sequences=3,
        max_batch_tokens=64,
    )


def test_the_scheduler_gets_its_share_of_the_settings():
    assert launch.scheduler_config(settings()) == SchedulerConfig()
    words = (
        *("--scheduling-policy", "priority", "--max-num-queued-reqs", "7", "--no-overlap"),
        *("--no-prefix-cache", "--speculation", "ngram", "--num-speculative-tokens", "5"),
    )
    assert launch.scheduler_config(settings(*words)) == SchedulerConfig(
        policy="priority", max_waiting=7, overlap=False, prefix_cache=False, num_ngram_drafts=5
    )


def test_no_drafts_means_no_speculation():
    words = ("--speculation", "ngram", "--max-draft-tokens", "0")
    assert launch.scheduler_config(settings(*words)).num_ngram_drafts == 0


def test_the_operators_sampling_wins_over_the_models_own(tmp_path):
    ours = SamplingSettings(top_k=3)
    assert launch.sampling_defaults(ours, tmp_path) == ours
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_k": 20, "top_p": "x", "min_p": True}))
    found = launch.sampling_defaults(ours, tmp_path)
    assert found == SamplingSettings(temperature=0.6, top_k=3)
    file.write_text("[")
    with pytest.raises(ModelError, match=r"generation_config\.json is not a JSON object"):
        launch.sampling_defaults(SamplingSettings(), tmp_path)


def test_a_gguf_file_recommends_sampling_in_its_metadata(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_float32("general.sampling.temp", 0.5)
    writer.add_int32("general.sampling.top_k", 20)
    writer.add_string("general.sampling.top_p", "high")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = launch.sampling_defaults(SamplingSettings(top_k=3), tmp_path / "tiny.gguf")
    assert found == SamplingSettings(temperature=0.5, top_k=3)


def test_a_file_is_found_beside_others_or_by_its_path(tmp_path):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"")
    for words in (["--f", file], ["--w", tmp_path, "--f", "tiny.gguf"], ["--m", file]):
        assert launch.find_model(settings(*map(str, words)).engine) == file
    assert launch.find_model(settings("--f", "other.gguf").engine, str(file)) == file


def test_the_token_file_wins_over_the_token(tmp_path):
    file = tmp_path / "token"
    file.write_text("hf_file\n")
    assert launch.hub_token(EngineSettings(hf_token="hf_env")) == "hf_env"
    assert launch.hub_token(EngineSettings(hf_token="x", hf_token_path=str(file))) == "hf_file"
