"""A folder's tokenizer as GGUF keys: the same ids from both, or a refusal that says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Source
from vllm_models.gguf.write import write_gguf
from vllm_models.hub import resolve_model
from vllm_server.text.gguf_tokenizer import scored_merges, space_normalizer, word_splitter
from vllm_server.text.pretokenizers import PRE_TOKENIZERS
from vllm_server.text.tokenizer import Tokenizer
from vllm_server.text.tokenizer_metadata import tokenizer_metadata
from vllm_traits import ModelError

TEXTS = [
    *["", " ", "Hello world", "  two  spaces\n\n\n and\ttabs \r\n", "don't I'LL 'tis we'Ve"],
    *[
        "12345 1.5e-10 a1b22c333",
        "\u4f60\u597d\u4e16\u754c \u3053\u3093",
        "e\u0301 \u00e9 \U0001f999",
    ],
    *["foo_bar(x) += {y: 'z'} // http://a.b/c?d=1", "CamelCase XMLHttp", "a<s>b</s> <think> c"],
]
KINDS = list({entry: name for name, entry in reversed(PRE_TOKENIZERS.items())}.values())


def save(source: Source, folder: Path, **config: Any) -> Path:
    source.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes))
    return folder


def trained(name: str = "gpt-2") -> Source:
    entry = PRE_TOKENIZERS[name]
    source = Source(models.BPE(ignore_merges=entry.ignores_merges))
    source.pre_tokenizer, source.decoder = word_splitter(entry), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        show_progress=False,
        initial_alphabet=alphabet,
        special_tokens=["<s>", "</s>"],
    )
    source.train_from_iterator(TEXTS * 3, trainer)
    source.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return source


def sentence_piece(prefixed: bool, whole: bool = True) -> Source:
    """Pieces with spaces; `whole` is whether every way to join two of them is a merge."""
    special, bytes_ = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["\u2581a", "ll", "ello", "\u2581H", "lo", "\u2581Hello", "wo", "\u2581wo", "o\u2581"]
    letters = sorted(set("".join(TEXTS[:5]).replace(" ", "\u2581")) - {"\n", "\t", "\r"})
    texts = [*special, *bytes_, *pieces, "el", *letters]
    merges = scored_merges(
        texts[259:], [1] * len(texts[259:]), [-float(i) for i in range(len(texts))]
    )
    source = Source(
        models.BPE(
            {text: i for i, text in enumerate(texts)},
            merges if whole else merges[:-3],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    source.normalizer = space_normalizer(prefixed)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    source.decoder = decoders.Sequence([*steps, *[decoders.Strip(" ", 1, 0)] * prefixed])
    source.add_special_tokens(special)
    source.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return source


def stand_ins(**values: Any) -> dict[str, Any]:
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return step | values


def after(step: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [step, stand_ins(use_regex=False)]}


def split(regex: str, **values: Any) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": "Isolated",
        "invert": False,
        **values,
    }


def assert_same(folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The metadata, once a file with it has given the ids of the folder for every text."""
    metadata = tokenizer_metadata(folder)
    path = tmp_path / "model.gguf"
    write_gguf(path, {"general.architecture": "llama", **metadata}, [])
    ours, theirs = Tokenizer(path), Tokenizer(folder)
    for text in TEXTS:
        for special in (True, False):
            expected = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == expected, text
        assert ours.decode(expected) == theirs.decode(expected)
    for name in ("bos_token", "eos_token", "vocab_size", "special_ids"):
        assert getattr(ours, name) == getattr(theirs, name)
    return metadata


def test_the_embedded_model_gives_the_same_ids_and_prompts(tmp_path):
    folder = resolve_model("builtin")
    metadata = assert_same(folder, tmp_path)
    assert metadata["tokenizer.ggml.padding_token_id"] == 4087
    talk = [{"role": "user", "content": "Hi"}]
    from_file, from_folder = Tokenizer(tmp_path / "model.gguf"), Tokenizer(folder)
    assert from_file.apply_chat_template(talk) == from_folder.apply_chat_template(talk)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_byte_level_tokenizer_is_found_by_what_it_does(name, tmp_path):
    source = trained(name)
    if PRE_TOKENIZERS[name].composes:
        document = json.loads(source.to_str()) | {"normalizer": {"type": "NFC"}}
        source = Source.from_str(json.dumps(document))
    metadata = assert_same(save(source, tmp_path), tmp_path)
    assert metadata["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize("prefixed", [True, False])
def test_sentence_piece_is_written_as_scores(prefixed, tmp_path):
    metadata = assert_same(save(sentence_piece(prefixed), tmp_path), tmp_path)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is prefixed
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]


def test_merges_that_no_scores_give_are_written_as_they_are(tmp_path):
    metadata = assert_same(save(sentence_piece(False, whole=False), tmp_path), tmp_path)
    assert metadata["tokenizer.ggml.model"] == "gemma4"


def test_spaces_may_be_written_by_the_pre_tokenizer(tmp_path):
    for scheme, prefixed in (("always", True), ("never", False)):
        spaces = {"type": "Metaspace", "replacement": "\u2581", "split": False}
        folder = save(sentence_piece(prefixed), tmp_path)
        edit(folder, normalizer=None, pre_tokenizer={**spaces, "prepend_scheme": scheme})
        found = tokenizer_metadata(folder)
        assert found["tokenizer.ggml.add_space_prefix"] is prefixed
        assert found["tokenizer.ggml.model"] == "llama"


def test_rows_without_a_token_are_marked_as_unused(tmp_path):
    metadata = tokenizer_metadata(save(trained(), tmp_path), 340)
    assert metadata["tokenizer.ggml.tokens"][-1] == "[PAD339]"
    assert metadata["tokenizer.ggml.token_type"][-10:] == [4, *[5] * 9]


def test_bos_and_eos_are_added_as_the_folder_adds_them(tmp_path):
    source = trained()
    source.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    metadata = assert_same(save(source, tmp_path), tmp_path)
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.ggml.add_eos_token"] is True


def test_other_spellings_of_an_expression_are_the_same(tmp_path):
    regex = PRE_TOKENIZERS["dbrx"].splits[0]
    short, spelled = (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
    )
    for text, behaviour in (
        (regex.replace(short, spelled), {"behavior": "Isolated", "invert": False}),
        (regex.replace(r"\r", "\r").replace(r"\n", "\n"), {"behavior": "Removed", "invert": True}),
    ):
        folder = edit(
            save(trained("dbrx"), tmp_path), pre_tokenizer=after(split(text, **behaviour))
        )
        assert tokenizer_metadata(folder)["tokenizer.ggml.pre"] == "dbrx"


FAULTS = {
    "an expression of its own": (
        {"pre_tokenizer": after(split("[ab]+"))},
        r"cuts words by \['\[ab\]\+'\]",
    ),
    "no expression": ({"pre_tokenizer": stand_ins(use_regex=False)}, r"cuts words by \[\]"),
    "removed text": (
        {"pre_tokenizer": after(split("a", behavior="Removed"))},
        "has the step Split",
    ),
    "a prefix": ({"pre_tokenizer": stand_ins(add_prefix_space=True)}, "has the step ByteLevel"),
    "no bytes": ({"pre_tokenizer": {"type": "Whitespace"}}, "is not byte-level"),
    "small letters": ({"normalizer": {"type": "Lowercase"}}, r"normalizer is \['Lowercase'\]"),
    "composing, where it is not known": (
        {
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": after(split(PRE_TOKENIZERS["tekken"].splits[0])),
        },
        "after composing",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_the_keys_cannot_say_is_refused(name, tmp_path):
    changes, message = FAULTS[name]
    folder = edit(save(trained(), tmp_path), **changes)
    with pytest.raises(ModelError, match=message):
        tokenizer_metadata(folder)
    assert tokenizer_metadata(edit(folder, normalizer=None, pre_tokenizer=stand_ins()))


def test_sentence_piece_that_scores_cannot_give_is_refused(tmp_path):
    with pytest.raises(ModelError, match="do not follow from scores"):
        tokenizer_metadata(save(sentence_piece(True, whole=False), tmp_path))
    folder = edit(save(sentence_piece(True), tmp_path), normalizer={"type": "NFKC"})
    with pytest.raises(ModelError, match="no usual spaces"):
        tokenizer_metadata(folder)


def test_other_models_and_too_few_rows_are_refused(tmp_path):
    with pytest.raises(ModelError, match="331 tokens for 300 rows"):
        tokenizer_metadata(save(trained(), tmp_path), 300)
    unigram = Source(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False))
    with pytest.raises(ModelError, match="of the kind Unigram"):
        tokenizer_metadata(save(unigram, tmp_path))
