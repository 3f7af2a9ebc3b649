"""`vllm-lite tokenize`: ids and pieces of a text from a tokenizer alone."""

import io
import json
import subprocess
import sys

import pytest
from vllm_models.gguf.write import write_gguf
from vllm_models.hub import resolve_model
from vllm_server.cli import main
from vllm_server.text.tokenizer import Tokenizer
from vllm_server.text.tokenizer_metadata import tokenizer_metadata

pytestmark = pytest.mark.usefixtures("restored_process")


@pytest.fixture
def gguf(tmp_path):
    """The embedded model's tokenizer in a file that has nothing else, with a BOS."""
    keys = tokenizer_metadata(resolve_model("builtin"))
    keys |= {"tokenizer.ggml.bos_token_id": 4088, "tokenizer.ggml.add_bos_token": True}
    write_gguf(tmp_path / "tiny.gguf", {"general.architecture": "qwen3", **keys}, [])
    return tmp_path / "tiny.gguf"


def tokenize(capsys, *words):
    assert main(["tokenize", *words]) == 0
    return capsys.readouterr().out


def test_each_token_is_shown_with_its_piece_on_one_line(capsys):
    text = "Hello, world\n\U0001f999"
    rows = [line.split("\t") for line in tokenize(capsys, text).splitlines()]
    assert [int(token_id) for token_id, _ in rows] == Tokenizer(resolve_model("builtin")).encode(
        text
    )
    assert "".join(piece for _, piece in rows) == r"Hello, world\n\xf0\x9f\xa6\x99"


def test_a_file_alone_is_enough_and_json_lists_the_ids(capsys, gguf):
    ids = Tokenizer(resolve_model("builtin")).encode("Once upon a time")
    out = tokenize(capsys, "--model", str(gguf), "--json", "Once upon a time")
    assert json.loads(out) == [4088, *ids]
    out = tokenize(capsys, "--json", "--no-special", "Once upon a time", "--model", str(gguf))
    assert json.loads(out) == ids
    out = tokenize(capsys, "--m", str(gguf.parent), "--f", gguf.name, "--json", "Once upon a time")
    assert json.loads(out) == [4088, *ids]


@pytest.mark.parametrize("words", [["-"], []])
def test_the_text_may_come_from_stdin_to_the_last_byte(capsys, monkeypatch, words):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a\r\nb\u00e9\n".encode())))
    found = json.loads(tokenize(capsys, "--json", *words))
    assert Tokenizer(resolve_model("builtin")).decode(found) == "a\r\nb\u00e9\n"


def test_an_empty_text_has_no_tokens(capsys):
    assert tokenize(capsys, "") == ""
    assert tokenize(capsys, "--json", "") == "[]\n"


def test_what_cannot_be_read_is_told_by_the_exit_code(capsys, monkeypatch, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for name in (tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path):
        assert main(["tokenize", "--model", str(name), "x"]) == 3
        assert str(tmp_path) in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert main(["tokenize"]) == 2
    assert "not UTF-8 at byte 2" in capsys.readouterr().err


def test_torch_is_never_imported(gguf):
    code = (
        "import sys; from vllm_server.cli import main; "
        f"assert main(['tokenize', '--model', {str(gguf)!r}, '--json', 'a']) == 0; "
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
