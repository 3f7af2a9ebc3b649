"""Settings from flags, environment and YAML: names, values, precedence, refusals."""

from pathlib import Path

import pytest
import yaml
from vllm_server.config import Settings, load
from vllm_server.config.check import check
from vllm_server.config.fields import Field, all_fields
from vllm_server.config.flags import FlagParser
from vllm_server.config.unavailable import UNAVAILABLE
from vllm_server.launch import backend_options
from vllm_traits import ConfigError

SEED_YAML = """\
server: {host: "0.0.0.0", port: 8000, log_level: "info"}
engine: {max_draft_tokens: 8, num_kv_blocks: 1024, max_batch_size: 256, \
tensor_parallel_size: 1, kv_quantization: false}
auth:   {api_keys: [], rate_limit_requests: 100, rate_limit_window_secs: 60}
"""


def flags(*words: str):
    return FlagParser("serve", "A test.").parse(words)[1]


def samples(field: Field) -> tuple[str, str]:
    """Two valid values as text."""
    if field.kind == "bool":
        return "true", "false"
    if field.choices:
        return field.choices[0], field.choices[1]
    if field.kind in ("int", "float"):
        low = field.low if field.low is not None else 1
        high = field.high if field.high is not None else low + 7
        return (str(int(high)), str(int(max(low, high - 1)))) if field.kind == "int" else (
            str(high), str((low + high) / 2),
        )  # fmt: skip
    return "one", "two"


def as_flag(field: Field, text: str) -> list[str]:
    flag = field.flags[0]
    if field.kind == "bool":
        return [flag if text == "true" else f"--no-{flag[2:]}"]
    return [f"{flag}={text}" if flag.startswith("--") else flag, text][: 1 + (flag[:2] != "--")]


def value(configuration, field: Field):
    return getattr(getattr(configuration.settings, field.section), field.key)


def typed(field: Field, text: str):
    kinds = {"int": int, "float": float, "text": str, "bool": lambda t: t == "true"}
    return kinds[field.kind](text) if field.kind in kinds else (text,)


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("field", all_fields(), ids=lambda f: f.path)
def test_flags_beat_environment_beats_yaml_beats_defaults(field, write):
    a, b = samples(field)
    path = write(yaml.safe_dump({field.section: {field.key: typed(field, a)}}, width=1000))
    own, flag = {field.variables[0]: b}, flags(*as_flag(field, a))

    assert load(environ={}).settings == Settings()
    from_yaml = load(environ={}, config=path)
    assert value(from_yaml, field) == typed(field, a)
    assert from_yaml.origins.keys() == {field.path}
    assert str(path) in from_yaml.origins[field.path]
    from_env = load(environ=own, config=path)
    from_flag = load(flag, environ=own, config=path)
    if field.adds:
        assert value(from_env, field) == (a, b)
        assert value(from_flag, field) == (a, b)
        return
    assert value(from_env, field) == typed(field, b)
    assert from_env.origins[field.path] == f"environment {field.variables[0]}"
    assert value(from_flag, field) == typed(field, a)
    assert from_flag.origins[field.path].startswith("flag -")


@pytest.mark.parametrize(
    ("field", "name"), [(f, n) for f in all_fields() for n in f.seed_env], ids=lambda x: str(x)[:20]
)
def test_our_own_variable_beats_the_well_known_one_and_that_beats_yaml(field, name, write):
    a, b = samples(field)
    path = write(yaml.safe_dump({field.section: {field.key: typed(field, a)}}))
    known = load(environ={name: b}, config=path)
    both = load(environ={name: b, field.variables[0]: a})
    assert value(known, field) == ((a, b) if field.adds else typed(field, b))
    assert value(both, field) == ((b, a) if field.adds else typed(field, a))


@pytest.mark.parametrize("field", all_fields(), ids=lambda f: f.path)
def test_every_name_of_a_setting_works_as_flag_key_and_variable(field, write):
    a, _ = samples(field)
    for flag in field.flags:
        words = as_flag(field, a)
        words[0] = words[0].replace(field.flags[0], flag, 1)
        assert value(load(flags(*words), environ={}), field) == typed(field, a)
    for name, variable in zip(field.names, field.variables, strict=True):
        path = write(yaml.safe_dump({field.section: {name: typed(field, a)}}))
        assert value(load(environ={}, config=path), field) == typed(field, a)
        assert value(load(environ={variable: a}), field) == typed(field, a)


def test_config_file_of_the_seed_is_valid_as_it_stands(write):
    settings = load(environ={}, config=write(SEED_YAML)).settings
    assert settings.engine.max_num_seqs == 256
    assert settings.engine.num_kv_blocks == 1024
    assert settings.auth.rate_limit_requests == 100


def test_two_names_with_different_values_are_refused_and_equal_ones_pass(write):
    with pytest.raises(ConfigError, match=r"max_num_seqs.*max_batch_size.*two names"):
        load(environ={}, config=write("engine: {max_num_seqs: 4, max_batch_size: 5}"))
    same = load(environ={}, config=write("engine: {max_num_seqs: 4, max_batch_size: 4}"))
    assert same.settings.engine.max_num_seqs == 4
    with pytest.raises(ConfigError, match="two names"):
        load(flags("--max-num-seqs", "4", "--max-requests", "5"), environ={})


def test_a_repeated_flag_takes_its_last_value_so_that_scripts_can_be_overridden():
    given = flags("--host", "127.0.0.1", "--host", "0.0.0.0", "--overlap", "--no-overlap")
    settings = load(given, environ={}).settings
    assert settings.server.host == "0.0.0.0"
    assert settings.engine.overlap is False


def test_repeated_list_flags_and_commas_add_up():
    given = flags("--api-key", "a,b", "--api-key=c", "--served_model_name", "x")
    settings = load(given, environ={}).settings
    assert settings.auth.api_keys == ("a", "b", "c")
    assert settings.server.served_model_name == ("x",)


@pytest.mark.parametrize(
    "words",
    [
        ["--max-model-len", "4k"],
        ["--max-model-len=4k"],
        ["--max_model_len", "4000"],
        ["--max_model_len=4000"],
    ],
)
def test_flags_take_dashes_or_underscores_and_either_form_of_value(words):
    assert load(flags(*words), environ={}).settings.engine.max_model_len == 4000


@pytest.mark.parametrize(
    ("text", "number"), [("4k", 4000), ("4K", 4096), ("1G", 1 << 30), ("1.5g", 15 * 10**8)]
)
def test_sizes_take_decimal_and_binary_units(text, number):
    given = flags("--kv-cache-memory", text)
    assert load(given, environ={}).settings.engine.kv_cache_memory == number


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prefix-cache"], True),
        (["--no-prefix-cache"], False),
        (["--no_prefix_cache"], False),
        (["--prefix-cache=false"], False),
        (["--prefix-cache=TRUE"], True),
    ],
)
def test_switches_have_a_negative_form_and_take_true_or_false(words, expected):
    assert load(flags(*words), environ={}).settings.engine.prefix_cache is expected


def test_a_value_may_be_negative():
    given = flags("--top-k", "-1", "--presence-penalty", "-1.5", "--frequency-penalty=-2")
    sampling = load(given, environ={}).settings.sampling
    assert (sampling.top_k, sampling.presence_penalty, sampling.frequency_penalty) == (-1, -1.5, -2)


def test_shorthands_stand_for_a_value():
    settings = load(flags("--cpu", "--disable-shutdown-endpoint"), environ={}).settings
    assert settings.engine.device == "cpu"
    assert settings.server.shutdown_endpoint is False


def test_an_address_that_kubernetes_injects_as_port_is_ignored_with_a_warning():
    configuration = load(environ={"VLLM_PORT": "tcp://10.0.0.1:8000"})
    assert configuration.settings.server.port == 8000
    assert "VLLM_PORT=tcp://10.0.0.1:8000 is ignored" in configuration.warnings[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prot", "1"], r"Unknown flag --prot; did you mean --port\?$"),
        (["--zzzzzz"], r"Unknown flag --zzzzzz\.$"),
        (["stray"], "Unexpected argument 'stray'"),
        (["--port"], "--port.*expected one argument"),
        (["--port", "x"], "flag --port is 'x', but must be a whole number"),
        (["--port", "65536"], "must be at least 0 and at most 65535"),
        (["--block-size", "24"], "must be one of 16, 32, 64, 128"),
        (["--dtype", "bf17"], r"must be one of .*did you mean bf16\?$"),
        (["--temperature", "nan"], "must be a finite number"),
        (["--temperature", "2.5"], "at most 2"),
    ],
)
def test_bad_flags_are_refused_with_the_nearest_name(words, message):
    with pytest.raises(ConfigError, match=message):
        load(flags(*words), environ={})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server: {prot: 1}", r":1:10: unknown key 'server.prot'; did you mean server.port\?$"),
        ("\nsevrer:\n  port: 1", r"unknown section 'sevrer'; did you mean server\?$"),
        ("server:\n  port: [1", r"config.yaml:2:11: not valid YAML"),
        ("server:\n  port: 1\n  port: 2", r"config.yaml:3:3: 'port' appears twice"),
        ("server:\n  port: eighty", r"yaml:2:3 server.port is 'eighty', but must be a whole"),
        ("server:\n  port: true", "must be a whole number"),
        ("server: 3", "config.yaml:1:9: Section 'server' must be a mapping"),
        ("- a", "The file must be a mapping"),
        ("{[1]: 2}", "a key must be a word"),
        ("engine: {model: 5}", "must be text; put it in quotes"),
        ("engine: {model: !!python/name:os.system x}", "1:17: not valid YAML"),
        ("auth: {api_keys: 7}", "must be a list"),
        ("auth: {api_keys: [{nmae: x}]}", r"no part 'nmae'; did you mean name\?$"),
        ("auth: {api_keys: [{name: x}]}", "needs `key`"),
        ("engine: {prefix_cache: maybe}", "must be true or false"),
        ("server: {port: null}", "must be a whole number"),
    ],
)  # fmt: skip
def test_bad_yaml_is_refused_with_line_and_column(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load(environ={}, config=write(text))


def test_yaml_may_be_empty_and_null_means_absent_where_that_is_a_value(write):
    assert load(environ={}, config=write("")).settings == Settings()
    assert (
        load(environ={}, config=write("server:\nengine: {max_tokens: null}")).settings == Settings()
    )


def test_a_secret_is_not_repeated_in_a_message(write):
    with pytest.raises(ConfigError) as raised:
        load(environ={}, config=write("auth: {api_keys: {hunter2hunter2: 1}}"))
    assert "hunter2" not in str(raised.value)


def test_config_path_comes_from_the_environment_and_a_missing_file_is_refused(write):
    path = write("server: {port: 9}")
    assert load(environ={"VLLM_CONFIG_PATH": str(path)}).settings.server.port == 9
    with pytest.raises(
        ConfigError, match=r"Cannot read the configuration file nowhere\.yaml: No such"
    ):
        load(environ={}, config=Path("nowhere.yaml"))


def test_an_unknown_variable_of_our_prefix_is_refused_and_foreign_ones_pass():
    with pytest.raises(
        ConfigError, match=r"VLLM_LITE_SERVER_PROT; did you mean VLLM_LITE_SERVER_PORT\?$"
    ):
        load(environ={"VLLM_LITE_SERVER_PROT": "1"})
    assert load(environ={"VLLM_SOMETHING": "1", "PATH": "/bin"}).settings == Settings()


@pytest.mark.parametrize("name", ["VLLM_LITE_NATIVE", "VLLM_LITE_CACHE"])
def test_variables_of_the_kernels_are_left_to_them(name):
    assert load(environ={name: "off"}).settings == Settings()


def neutral_flag(entry, flag):
    if entry.switch:
        return [f"--no-{flag[2:]}"]
    return [flag, entry.neutral[0]]


@pytest.mark.parametrize("entry", UNAVAILABLE, ids=lambda e: e.flags[0])
def test_a_feature_that_does_not_exist_is_refused_by_every_name(entry, write):
    for flag in entry.flags:
        with pytest.raises(ConfigError, match="not available in this version"):
            flags(*([flag] if entry.switch else [flag, "2"]))
        if entry.neutral:
            assert flags(*neutral_flag(entry, flag)) == []
    for key in entry.keys:
        section, name = key.split(".")
        with pytest.raises(ConfigError, match=f"{key}: .*not available in this version"):
            load(environ={}, config=write(f"{section}: {{{name}: 2}}"))
        for word in (*entry.neutral, "null"):
            load(environ={}, config=write(f"{section}: {{{name}: {word}}}"))
    for name in entry.variables:
        with pytest.raises(ConfigError, match=f"{name}: .*not available"):
            load(environ={name: "2"})


def kv_cache_dtype(*argv, environ=None, config=None):
    """What the engine is told."""
    found = check(load(flags(*argv), environ or {}, config))
    return backend_options(found.settings.engine, Path("model")).kv_cache_dtype


def test_the_type_of_the_kv_cache_has_names_for_every_source(write):
    assert kv_cache_dtype() == kv_cache_dtype("--no-kv-quantization") == "auto"
    assert kv_cache_dtype("--kv-cache-dtype", "int8") == kv_cache_dtype("--kv-quantization")
    assert kv_cache_dtype("--kv-quantization") == "int8"
    assert kv_cache_dtype("--fp8-kvcache") == "fp8"
    assert kv_cache_dtype(environ={"VLLM_KV_QUANTIZATION": "1"}) == "int8"
    assert kv_cache_dtype(environ={"VLLM_LITE_ENGINE_KV_CACHE_DTYPE": "fp8"}) == "fp8"
    assert kv_cache_dtype(config=write("engine: {kv_quantization: true}")) == "int8"


@pytest.mark.parametrize(
    "argv",
    [
        ("--kv-quantization", "--fp8-kvcache"),
        ("--kv-quantization", "--kv-cache-dtype", "auto"),
        ("--fp8-kvcache", "--kv-cache-dtype=int8"),
    ],
)
def test_two_types_of_the_kv_cache_are_a_contradiction(argv):
    with pytest.raises(ConfigError, match=r"engine\.\w+ .* and engine\..* contradict each other"):
        kv_cache_dtype(*argv)


def test_no_refused_name_is_also_a_setting():
    names = {flag for f in all_fields() for flag in f.flags}
    assert not names & {flag for e in UNAVAILABLE for flag in e.flags}
    keys = {f"{f.section}.{n}" for f in all_fields() for n in f.names}
    assert not keys & {key for e in UNAVAILABLE for key in e.keys}


def test_every_name_belongs_to_one_setting():
    for names in (
        [flag for f in all_fields() for flag in f.flags],
        [f"{f.section}.{name}" for f in all_fields() for name in f.names],
        [name for f in all_fields() for name in (*f.variables, *f.seed_env)],
    ):
        assert len(names) == len(set(names))


def test_every_default_is_a_value_its_setting_would_accept():
    for field in all_fields():
        assert field.optional == (field.default is None)
        if field.choices and field.default is not None:
            assert str(field.default) in field.choices
