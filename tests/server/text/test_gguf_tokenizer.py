"""Vocabularies of GGUF files: the expected ids, what stands around them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex
from vllm_models.gguf.header import GgufHeader
from vllm_models.gguf.write import write_gguf
from vllm_server.text.detokenize import decode
from vllm_server.text.gguf_tokenizer import MAX_TOKEN_CHARS, scored_merges, vocabulary_of
from vllm_server.text.pieces import pieces_of
from vllm_server.text.pretokenizers import PRE_TOKENIZERS
from vllm_server.text.tokenizer import Tokenizer
from vllm_traits import ModelError

DATA = Path(__file__).parents[4] / "shared" / "data" / "vocab"
BOS = {"gpt-2": [], "llama-bpe": [128000], "llama-spm": [1], "qwen2": []}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)


def header(**values: Any) -> GgufHeader:
    keys = {f"tokenizer.ggml.{name}": value for name, value in values.items()}
    return GgufHeader({"general.architecture": "llama", **keys}, {}, (Path("x.gguf"),))


def byte_level(**values: Any) -> dict[str, Any]:
    """Six tokens: `a`, `b`, `ab`, a special, a user's, and BOS."""
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["a", "b", "ab", "<end>", "<think>", "<bos>"],
        "token_type": [NORMAL, NORMAL, NORMAL, CONTROL, USER, CONTROL],
        "merges": ["a b"],
        "bos_token_id": 5,
        "eos_token_id": 3,
        **values,
    }


def scored(**values: Any) -> dict[str, Any]:
    """SentencePiece's first tokens and bytes, and a few pieces, better ones first."""
    pieces = ["\u2581a", "ab", "bc", "\u2581", "a", "b", "c"]
    return {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *BYTES, *pieces],
        "token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces)],
        "scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        **values,
    }


def ids_of(values: dict[str, Any], text: str, **options: Any) -> list[int]:
    return vocabulary_of(header(**values)).source.encode(text, **options).ids


def texts_of(values: dict[str, Any], text: str) -> list[str]:
    return vocabulary_of(header(**values)).source.encode(text, add_special_tokens=False).tokens


@pytest.fixture(scope="module", params=BOS)
def real(request) -> tuple[str, Tokenizer]:
    path = DATA / f"ggml-vocab-{request.param}.gguf"
    if not path.is_file():
        pytest.skip(f"real vocabularies are not at {DATA}")
    return request.param, Tokenizer(path)


def real_texts(name: str) -> list[tuple[str, list[int]]]:
    texts = (DATA / f"ggml-vocab-{name}.gguf.inp").read_text("utf-8")
    lines = (DATA / f"ggml-vocab-{name}.gguf.out").read_text("utf-8").splitlines()
    found = texts.split("\n__ggml_vocab_test__\n")[: len(lines)]
    return list(zip(found, [[int(i) for i in line.split()] for line in lines], strict=True))


def test_real_vocabularies_give_the_expected_ids(real):
    name, tokenizer = real
    cases = real_texts(name)
    assert len(cases) > 40
    for text, expected in cases:
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text
        assert tokenizer.encode(text) == BOS[name] + expected, text


def test_real_texts_come_back_token_by_token(real):
    name, tokenizer = real
    for text, expected in real_texts(name):
        stream = tokenizer.detokenizer()
        shown = "".join(stream.feed([i]) for i in expected) + stream.flush()
        assert shown == text == tokenizer.decode(expected)


def test_special_tokens_in_a_text_are_found_and_left_out_when_shown():
    ids = ids_of(byte_level(), "ab<end>a<think>b", add_special_tokens=False)
    assert ids == [2, 3, 0, 4, 1]
    pieces = pieces_of(vocabulary_of(header(**byte_level())).source)
    assert decode(pieces, ids) == "aba<think>b"
    assert decode(pieces, ids, skip_special_tokens=False) == "ab<end>a<think>b"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [2]),
        ({"pre": "llama-bpe"}, [5, 2]),
        ({"pre": "llama-bpe", "add_bos_token": False}, [2]),
        ({"add_bos_token": True}, [5, 2]),
        ({"add_bos_token": True, "add_eos_token": True}, [5, 2, 3]),
        ({"add_eos_token": True}, [2, 3]),
    ],
)
def test_bos_and_eos_stand_where_the_file_or_its_kind_says(values, expected):
    assert ids_of(byte_level(**values), "ab") == expected


def test_only_some_kinds_keep_a_word_whole_that_merges_do_not_reach():
    values = byte_level(merges=["b a"], tokens=["a", "b", "ab", "ba", "<think>", "<bos>"])
    assert ids_of(values, "ab", add_special_tokens=False) == [0, 1]
    whole = values | {"pre": "llama-bpe"}
    assert ids_of(whole, "ab", add_special_tokens=False) == [2]


def test_text_is_composed_where_the_models_do_so():
    two_bytes = ["\u00c3", "\u00a9", "\u00c3\u00a9"]  # stand-ins of the bytes of a composed letter
    values = byte_level(tokens=[*two_bytes, "e", "x", "<bos>"], merges=["\u00c3 \u00a9"])
    values["token_type"] = [NORMAL] * 6
    assert ids_of(values | {"pre": "qwen2"}, "e\u0301") == [2]
    assert ids_of(values | {"pre": "qwen2"}, "\u00e9") == [2]
    assert ids_of(values, "e\u0301") == [3]


def test_the_best_score_merges_first():
    assert texts_of(scored(add_space_prefix=False), "abc") == ["ab", "c"]
    better = scored(add_space_prefix=False)
    better["scores"] = [*better["scores"][:261], 5.0, *better["scores"][262:]]
    assert texts_of(better, "abc") == ["a", "bc"]


def test_a_space_is_put_before_a_text_and_after_special_tokens_unless_the_file_says_no():
    assert texts_of(scored(), "ab</s>ab") == ["\u2581a", "b", "</s>", "\u2581a", "b"]
    assert texts_of(scored(add_space_prefix=False), "ab</s>ab") == ["ab", "</s>", "ab"]
    assert ids_of(scored(), "") == [1]


def test_characters_without_a_token_become_bytes_and_come_back():
    values = scored()
    ids = ids_of(values, "a\u00e9\n", add_special_tokens=False)
    assert [values["tokens"][i] for i in ids] == ["\u2581a", "<0xC3>", "<0xA9>", "<0x0A>"]
    assert decode(pieces_of(vocabulary_of(header(**values)).source), ids) == "a\u00e9\n"


def test_merges_of_scores_leave_out_special_tokens_and_bytes():
    texts, types = ["a", "b", "ab", "aba", "ba"], [NORMAL] * 5
    scores = [0.0, 0.0, -2.0, -1.0, -3.0]
    assert scored_merges(texts, types, scores) == [
        *[("a", "ba"), ("ab", "a")],
        *[("a", "b"), ("b", "a")],
    ]
    assert scored_merges(texts, [NORMAL, NORMAL, CONTROL, NORMAL, BYTE], scores) == []


def test_merges_by_rank_over_characters_keep_spaces_and_always_have_a_bos():
    tokens = ["<bos>", "\u2581", "a", "\u2581a", *BYTES]
    values = {
        "model": "gemma4",
        "tokens": tokens,
        "token_type": [CONTROL, NORMAL, NORMAL, NORMAL, *[BYTE] * 256],
        "merges": ["\u2581 a"],
        "bos_token_id": 0,
        "add_bos_token": False,
    }
    assert ids_of(values, " a a\n") == [0, 3, 3, 4 + 0x0A]


def test_special_tokens_of_phi3_take_the_space_that_follows():
    values = header(**scored(add_space_prefix=False))
    phi3 = GgufHeader({**values.metadata, "general.architecture": "phi3"}, {}, values.paths)
    text = "</s>\na<s>\na"
    byte, letter = 3 + 0x0A, 263
    for file, expected in (
        (values, [2, byte, letter, 1, byte, letter]),
        (phi3, [2, letter, 1, byte, letter]),
    ):
        assert vocabulary_of(file).source.encode(text, add_special_tokens=False).ids == expected


def test_tokens_without_text_keep_their_ids():
    values = byte_level(tokens=["a", "b", "ab", "", "", "<bos>"], token_type=[NORMAL] * 6)
    source = vocabulary_of(header(**values)).source
    assert source.get_vocab_size() == 6
    assert source.token_to_id("<bos>") == 5


def test_a_file_and_one_of_a_set_are_opened_with_their_template(tmp_path):
    keys = header(**byte_level()).metadata
    keys = {**keys, "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    write_gguf(tmp_path / "one.gguf", keys, [])
    for number in (1, 2):
        part = {"split.no": number - 1, "split.count": 2}
        more = keys if number == 1 else {"general.architecture": "llama"}
        write_gguf(tmp_path / f"set-0000{number}-of-00002.gguf", {**more, **part}, [])
    for name in ("one.gguf", "set-00001-of-00002.gguf", "set-00002-of-00002.gguf"):
        tokenizer = Tokenizer(tmp_path / name)
        assert tokenizer.encode("ab") == [2]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (5, 3)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}]) == "<bos>ab"
        assert tokenizer.vocab_size == 6


FAULTS = {
    "no model": ({"model": 3}, "must be a string"),
    "an unknown model": ({"model": "rwkv"}, r"'rwkv', but must be one of \['gpt2', 'llama'"),
    "an unknown pre-tokenizer": ({"pre": "zzz"}, "'zzz', but only these are known: .*qwen2"),
    "no tokens": ({"tokens": []}, "must be an array of str"),
    "tokens that are numbers": ({"tokens": [1, 2]}, "must be an array of str"),
    "a token twice": ({"tokens": ["a", "b", "ab", "b", "c", "d"]}, "has 'b' twice"),
    "too few types": ({"token_type": [1]}, "has 1 items for 6 tokens"),
    "types that are texts": ({"token_type": ["a"] * 6}, "must be an array of int"),
    "merges of no tokens": ({"merges": ["a c"]}, "do not fit the tokens"),
    "merges that are one word": ({"merges": ["ab"]}, "do not fit the tokens"),
    "a BOS that is no token": ({"bos_token_id": 6}, "is 6, but there are 6 tokens"),
    "a BOS to add that is not there": (
        {"bos_token_id": None, "add_bos_token": True},
        "needs a bos_token_id",
    ),
    "bytes that are no text": (
        {"tokens": ["a", "b", "ab", "\udcff", "c", "d"]},
        "has one that is not UTF-8",
    ),
    "an endless token": (
        {"tokens": ["a", "b", "ab", "x" * (MAX_TOKEN_CHARS + 1), "c", "d"]},
        "has one of over",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_contradictory_vocabulary_is_refused_with_the_key(name):
    values, message = FAULTS[name]
    given = {key: value for key, value in byte_level(**values).items() if value is not None}
    with pytest.raises(ModelError, match=message) as caught:
        vocabulary_of(header(**given))
    assert "x.gguf: 'tokenizer.ggml." in str(caught.value)


def test_scores_are_needed_for_every_token():
    with pytest.raises(ModelError, match="has 1 items for 266 tokens"):
        vocabulary_of(header(**scored(scores=[0.0])))


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_the_expressions_of_every_kind_compile(name):
    for split in PRE_TOKENIZERS[name].splits:
        assert Regex(split)


@given(text=st.text(max_size=40))
def test_any_text_comes_back_from_scored_vocabularies(text):
    source = vocabulary_of(header(**scored())).source
    ids = source.encode(text, add_special_tokens=False).ids
    if "\u2581" not in text and not any(word in text for word in ("<s>", "</s>", "<unk>")):
        assert decode(pieces_of(source), ids) == text
