"""How the KV pool is sized, and what is refused before it is allocated."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from vllm_models import BackendOptions, device
from vllm_models.runner import memory
from vllm_traits import ConfigError, DeviceError

pytestmark = pytest.mark.usefixtures("torch_products")  # weights are not padded

BYTES_PER_BLOCK = 2 * 2 * 4 * 2 * 16 * 4  # layers, keys and values, positions, heads, width, f32


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that so many bytes are free."""

    def pretend(num_bytes: int) -> None:
        monkeypatch.setattr(memory, "free_memory", lambda _: num_bytes)

    return pretend


def test_the_pool_never_holds_more_than_every_sequence_at_full_length(small: Any) -> None:
    backend = small.load(num_blocks=None, max_sequences=3, max_model_len=50)
    assert backend.info.num_blocks == 3 * 13
    report = backend.memory
    assert (report.num_tokens, report.kv_bytes) == (156, 39 * BYTES_PER_BLOCK)
    assert report.max_concurrency == pytest.approx(156 / 50)
    assert report.weight_bytes == sum(p.numel() * 4 for p in small.model.parameters())
    assert (report.dtype, report.device, report.notes) == ("float32", "cpu", ())


def test_the_pool_takes_its_share_of_the_free_memory(small: Any, free: Any) -> None:
    free(2_000_000)
    half = small.load(num_blocks=None, memory_fraction=0.5, max_batch_tokens=8).info.num_blocks
    whole = small.load(num_blocks=None, memory_fraction=1.0, max_batch_tokens=8).info.num_blocks
    weight_bytes = sum(p.numel() * 4 for p in small.model.parameters())
    difference = (2_000_000 + weight_bytes) * 0.5 / BYTES_PER_BLOCK
    assert abs(whole - half - difference) <= 1


def test_kv_cache_memory_replaces_the_fraction(small: Any, free: Any) -> None:
    free(0)
    backend = small.load(num_blocks=None, kv_cache_memory=70 * BYTES_PER_BLOCK + 5)
    assert backend.info.num_blocks == 70


def test_a_default_length_shrinks_to_what_fits_and_says_so(small: Any) -> None:
    backend = small.load(num_blocks=10)
    assert backend.info.max_model_len == 40
    assert backend.memory.notes == (
        "The longest sequence is 40 tokens instead of 256: memory is short.",
    )


def test_a_length_that_was_asked_for_never_shrinks(small: Any, free: Any) -> None:
    with pytest.raises(ConfigError, match="--max-model-len 40"):
        small.load(num_blocks=10, max_model_len=100)
    with pytest.raises(DeviceError, match="--max-model-len 40"):
        small.load(num_blocks=None, kv_cache_memory=10 * BYTES_PER_BLOCK, max_model_len=100)


def test_a_length_beyond_the_model_is_refused(small: Any) -> None:
    with pytest.raises(ConfigError, match="max_model_len is 257, but the model was made for 256"):
        small.load(max_model_len=257)


def test_too_many_blocks_are_refused_with_the_number_that_fits(small: Any, free: Any) -> None:
    free(1_000_000)
    with pytest.raises(DeviceError, match=r"num_blocks is 100000 .*use --num-blocks (\d+)") as told:
        small.load(num_blocks=100_000, max_batch_tokens=8)
    fitting = int(str(told.value).split("--num-blocks ")[1].split()[0])
    assert small.load(num_blocks=fitting, max_batch_tokens=8).info.num_blocks == fitting
    with pytest.raises(DeviceError):
        small.load(num_blocks=fitting + 1, max_batch_tokens=8)


def test_no_room_for_a_single_block_is_refused(small: Any, free: Any) -> None:
    free(0)
    with pytest.raises(DeviceError, match="No KV block"):
        small.load(num_blocks=None)


def test_free_memory_respects_the_limit_of_a_container(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 250000\n")
    paths = (str(tmp_path / "memory.max"), str(tmp_path / "memory.current"))
    monkeypatch.setattr(device, "_CGROUP_FILES", (paths,))
    assert device.free_memory(torch.device("cpu")) == 1_250_000
    (tmp_path / "memory.max").write_text("max\n")
    assert device.free_memory(torch.device("cpu")) > 5_000_000


@pytest.mark.parametrize(
    "bad",
    [
        {"dtype": "int4"},
        {"device": "tpu"},
        {"memory_fraction": 0.0},
        {"memory_fraction": 1.5},
        {"num_blocks": 0},
        {"block_size": -1},
        {"max_sequences": 0},
        {"threads": 0},
    ],
)
def test_options_that_can_never_work_are_refused_by_name(small: Any, bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(ConfigError, match=name):
        BackendOptions(small.folder, **bad)


def test_a_missing_device_is_refused(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="cuda"):
        small.load(device="cuda")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bf16", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("f16", "float16"),
        ("half", "float16"),
        ("f32", "float32"),
        ("float", "float32"),
        ("auto", "float32"),
    ],
)
def test_every_name_of_a_dtype_means_the_same_everywhere(small: Any, name: str, dtype: str) -> None:
    backend = small.load(dtype=name)
    assert backend.memory.dtype == backend.info.kv_groups[0].dtype == dtype


def test_auto_takes_the_checkpoints_dtype_only_where_it_is_fast(
    make_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = make_checkpoint(saved_as=torch.bfloat16)
    for has_kernel, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has_kernel: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert saved.load(dtype="auto").memory.dtype == dtype


def test_a_small_model_computes_on_one_thread_unless_told_otherwise(small: Any) -> None:
    torch.set_num_threads(2)
    small.load()
    assert torch.get_num_threads() == 1
    small.load(threads=2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_importing_the_package_does_not_import_torch() -> None:
    code = (
        "import sys, vllm_models; "
        "vllm_models.BackendOptions; vllm_models.resolve_model('builtin'); "
        "assert not {'torch', 'safetensors', 'huggingface_hub', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names_are_pinned_and_all_there() -> None:
    import vllm_models

    assert vllm_models.__all__ == [
        "BackendOptions",
        "LoadProgress",
        "MemoryReport",
        "ModelConfig",
        "TorchBackend",
        "load_backend",
        "register_architecture",
        "resolve_model",
        "supported_architectures",
    ]
    assert all(getattr(vllm_models, name) for name in vllm_models.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = vllm_models.nothing
