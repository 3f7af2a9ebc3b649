"""`vllm-lite quantize`: complete files, and what is refused before anything is written."""

from pathlib import Path

import gguf
import pytest
from vllm_models.hub import resolve_model
from vllm_server import launch
from vllm_server.cli import main
from vllm_server.config import load
from vllm_server.config.flags import FlagParser
from vllm_server.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("restored_process")


def quantize(*words):
    return main(["quantize", *map(str, words)])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantize") / "demo.gguf"
    assert quantize("builtin", path, "--type", "Q4_K_M") == 0
    return path


def test_the_file_is_a_quarter_of_the_model(file):
    assert (
        file.stat().st_size < 0.4 * (resolve_model("builtin") / "model.safetensors").stat().st_size
    )
    assert [path.name for path in file.parent.iterdir()] == ["demo.gguf"]


def test_tokenizer_and_template_are_in_the_file(file):
    ours, theirs = Tokenizer(file), Tokenizer(resolve_model("builtin"))
    text = "What is vllm-lite? 1234 blocks,  naïvely…"
    assert ours.encode(text) == theirs.encode(text)
    talk = [{"role": "user", "content": "Hello"}]
    assert ours.apply_chat_template(talk) == theirs.apply_chat_template(talk)
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == theirs.eos_token_id
    assert fields["general.name"].contents() == "builtin"


def test_a_file_that_is_there_is_kept_unless_forced(file, capsys):
    before = file.read_bytes()
    assert quantize("builtin", file, "--type", "q8_0") == 2
    assert "--force" in capsys.readouterr().err
    assert file.read_bytes() == before
    copy = file.with_name("copy.gguf")
    copy.write_bytes(b"old")
    assert quantize("builtin", copy, "--type", "q8_0", "--force") == 0
    assert copy.read_bytes()[:4] == b"GGUF"
    copy.unlink()


@pytest.mark.parametrize(
    ("target", "kind", "said"),
    [
        ("m.gguf", "q9_k", "Unknown type 'q9_k'"),
        ("m.bin", "q8_0", "must end with .gguf"),
        ("absent/m.gguf", "q8_0", "is no folder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(tmp_path, capsys, target, kind, said):
    assert quantize("builtin", tmp_path / target, "--type", kind) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--isq", "--quant"])
def test_the_flag_for_loading_reaches_the_backend(flag):
    parsed = load(FlagParser("serve", "").parse(["--cpu", flag, "Q4_K"])[1], environ={})
    assert launch.backend_options(parsed.settings.engine, Path()).isq == "Q4_K"


def test_an_unknown_type_for_loading_is_refused_at_once(capsys):
    assert main(["generate", "a", "--isq", "q9"]) == 2
    assert "isq is 'q9'" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_refused(tmp_path, capsys):
    assert quantize(tmp_path / "absent.gguf", tmp_path / "m.gguf", "--type", "q8_0") == 3
    assert "absent.gguf" in capsys.readouterr().err


def test_a_quantized_file_is_refused(file, tmp_path, capsys):
    assert quantize(file, tmp_path / "m.gguf", "--type", "q8_0") == 3
    assert "quantized already" in capsys.readouterr().err
