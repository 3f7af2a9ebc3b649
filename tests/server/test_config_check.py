"""Settings that cannot work together, and the hardened profile."""

import pytest
from vllm_server.config import load
from vllm_server.config.check import check
from vllm_server.config.flags import FlagParser
from vllm_traits import ConfigError


def flags(*words: str):
    return FlagParser("serve", "A test.").parse(words)[1]


def hardened(*words: str):
    return check(load(flags("--hardened", *words), environ={})).settings


def test_hardened_listens_on_this_machine_only_and_has_no_http_shutdown():
    settings = hardened()
    assert settings.server.host == "127.0.0.1"
    assert settings.server.shutdown_endpoint is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "only with keys"),
        (["--api-key", "short"], "has 5 characters; a hardened server needs at least 16"),
        (["--admin-key", "short"], "needs at least 16"),
        (["--shutdown-endpoint"], "shutdown_endpoint is not allowed"),
        (["--metrics-public"], "metrics_public is not allowed"),
    ],
)
def test_hardened_refuses(words, message):
    with pytest.raises(ConfigError, match=message):
        hardened(*words)


def test_hardened_accepts_a_foreign_address_with_a_long_key_and_reads_the_key_file(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# ours\n0123456789abcdef\n")
    settings = hardened("--host", "0.0.0.0", "--api-key-file", str(keys))
    assert settings.server.host == "0.0.0.0"
    keys.write_text("short\n")
    with pytest.raises(ConfigError, match="has 5 characters"):
        hardened("--api-key-file", str(keys))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--f", "x.bin"], r"engine.gguf_file: 'x.bin' is not the name of a \.gguf file"),
        (["--m", "x.gguf", "--f", "y.gguf"], "but the model is 'x.gguf' already"),
        (["--w", "dir/X.GGUF", "--f", "y.gguf"], r"but the model is 'dir/X\.GGUF' already"),
        (["--chat-template", "missing.jinja"], "engine.chat_template: there is no file"),
        (["--api-key-file", "missing"], "auth.api_keys_file: there is no file"),
    ],
)
def test_settings_that_cannot_work_together_or_at_all_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        check(load(flags(*words), environ={}))
