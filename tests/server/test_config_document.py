"""What is written of the settings: effective values, reference, example, schema."""

import json
from pathlib import Path

import yaml
from vllm_server.config import Settings, load
from vllm_server.config.document import effective, example, json_schema, markdown
from vllm_server.config.fields import all_fields
from vllm_server.config.flags import FlagParser

ROOT = Path(__file__).parents[2]
ALL = frozenset(field.path for field in all_fields())


def flags(*words: str):
    return FlagParser("serve", "A test.").parse(words)[1]


def test_effective_configuration_is_yaml_with_origins_and_masked_secrets(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("engine: {max_num_seqs: 3}")
    configuration = load(
        flags("--api-key", "sesame-open-now", "--port", "9"),
        environ={"HF_TOKEN": "hf_secret"},
        config=path,
    )
    text = effective(configuration, ALL)
    parsed = yaml.safe_load(text)
    assert parsed["server"]["port"] == 9
    assert parsed["engine"]["max_num_seqs"] == 3
    assert parsed["auth"]["api_keys"] == ["***"]
    assert parsed["engine"]["hf_token"] == "***"
    assert "sesame" not in text and "hf_secret" not in text
    assert "port: 9  # flag --port" in text
    assert 'host: "0.0.0.0"  # default' in text
    assert "config.yaml:1:10 engine.max_num_seqs" in text
    assert {f.key for f in all_fields()} == {key for part in parsed.values() for key in part}


def test_effective_configuration_shows_the_settings_that_were_asked_for_alone():
    text = effective(load(environ={}), {"engine.model", "server.log_level"})
    assert yaml.safe_load(text) == {"server": {"log_level": "info"}, "engine": {"model": "builtin"}}


def test_the_printed_configuration_without_secrets_can_be_loaded_again(tmp_path):
    configuration = load(flags("--max-tokens", "7", "--cors-origins", "a"), environ={})
    path = tmp_path / "config.yaml"
    path.write_text(effective(configuration, ALL))
    again = load(environ={}, config=path)
    assert again.settings == configuration.settings


def test_configuration_document_is_up_to_date():
    written = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    assert written == markdown(), (
        "run `python -m vllm_server.config --markdown > docs/configuration.md`"
    )


def test_example_file_is_up_to_date_and_says_the_defaults():
    path = ROOT / "config.example.yaml"
    text = path.read_text("utf-8")
    assert text == example(), "run `python -m vllm_server.config --example > config.example.yaml`"
    assert load(environ={}, config=path).settings == Settings()
    shown = yaml.safe_load(text.replace("\n  # ", "\n  "))
    for field in all_fields():
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        assert shown[field.section][field.key] == default


def test_json_schema_knows_every_key():
    schema = json_schema()
    json.dumps(schema)
    for field in all_fields():
        assert field.key in schema["properties"][field.section]["properties"]
