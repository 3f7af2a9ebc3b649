"""Tokenizers, stop strings and reasoning: however a text is cut, it stays the same."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from vllm_server.text.answer import Answer
from vllm_server.text.detokenize import Detokenizer, decode
from vllm_server.text.pieces import pieces_of
from vllm_server.text.reasoning import Parts, ReasoningReader, is_opened
from vllm_server.text.stops import StopFinder
from vllm_server.text.tokenizer import Tokenizer as TextTokenizer
from vllm_traits import FinishReason, ModelError, RequestOutput

CUTS = st.lists(st.integers(0, 5), max_size=200)


def sentence_piece() -> Tokenizer:
    """A vocabulary of characters and bytes with the decoder of SentencePiece models."""
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    words = ["<unk>", "<s>", "</s>", *bytes_, "▁", *"abcdefgh é", "▁ab", "▁cd"]
    vocab = {w: i for i, w in enumerate(dict.fromkeys(words))}
    source = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    source.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    source.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    source.add_special_tokens(["<s>", "</s>"])
    return source


SPM = sentence_piece()


def cut(items, sizes):
    """A list or text in pieces of the given sizes, the rest as one."""
    pieces, at = [], 0
    for size in sizes:
        pieces.append(items[at : at + size])
        at += size
    return [*pieces, items[at:]]


@given(ids=st.lists(st.integers(0, 400), max_size=60), sizes=CUTS)
def test_byte_level_streams_equal_the_library_for_any_ids_and_any_cut(tokenizer, ids, sizes):
    stream = tokenizer.detokenizer()
    text = "".join(stream.feed(piece) for piece in cut(ids, sizes)) + stream.flush()
    assert text == tokenizer.decode(ids)
    assert text == tokenizer._source.decode(ids, skip_special_tokens=True)


@given(text=st.text(max_size=40), sizes=CUTS)
def test_byte_level_streams_never_show_a_broken_character(tokenizer, text, sizes):
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = tokenizer.detokenizer()
    shown = ""
    for piece in cut(ids, sizes):
        shown += stream.feed(piece)
        assert text.startswith(shown)
    assert shown + stream.flush() == text


@given(
    text=st.text(alphabet="abcdefgh é漢🙂", min_size=1, max_size=30),
    sizes=CUTS,
    special=st.booleans(),
)
def test_sentence_piece_streams_equal_the_library(text, sizes, special):
    pieces = pieces_of(SPM)
    ids = [1, *SPM.encode(text, add_special_tokens=False).ids, 2]
    stream = Detokenizer(pieces, skip_special_tokens=not special)
    shown = "".join(stream.feed(piece) for piece in cut(ids, sizes)) + stream.flush()
    assert shown == SPM.decode(ids, skip_special_tokens=not special)


def test_a_completion_keeps_the_space_before_its_first_word():
    pieces = pieces_of(SPM)
    prompt = SPM.encode("ab").ids
    more = [SPM.token_to_id("▁cd")]
    assert Detokenizer(pieces, [1, *prompt]).feed(more) == " cd"
    assert Detokenizer(pieces, [1]).feed(more) == "cd"


@given(text=st.text(max_size=40), special=st.booleans())
def test_encoding_equals_the_library(tokenizer, text, special):
    assert (
        tokenizer.encode(text, special) == tokenizer._source.encode(text, None, False, special).ids
    )


def test_an_event_loop_runs_on_while_a_long_text_is_encoded(tokenizer):
    async def run():
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(None, tokenizer.encode, "some words " * 100_000)
        num_turns = 0
        while not work.done():
            num_turns += 1
            await asyncio.sleep(0.001)
        assert len(await work) == 1_100_000
        return num_turns

    assert asyncio.run(run()) > 3


def test_ids_outside_the_vocabulary_have_no_text(tokenizer):
    assert tokenizer.decode([70, 5000, 2**31, 71]) == tokenizer.decode([70, 71])


def test_special_tokens_are_left_out_unless_wanted(tokenizer):
    assert tokenizer.decode([0, 1, 2]) == ""
    assert tokenizer.decode([0, 1], skip_special_tokens=False) == "<|end|><|im_start|>"


def test_an_unknown_decoder_is_named_when_the_model_is_loaded(tmp_path):
    source = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    source.decoder = decoders.WordPiece()
    source.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="WordPiece"):
        TextTokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 1}'])
def test_a_broken_tokenizer_file_is_a_model_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        TextTokenizer(tmp_path)


def test_a_folder_without_tokenizer_says_what_it_needs(tmp_path):
    with pytest.raises(ModelError, match=r"needs a tokenizer.json"):
        TextTokenizer(tmp_path)


def test_metaspace_decoders_drop_the_first_space_only():
    source = Tokenizer(models.BPE({"▁a": 0, "b": 1}, []))
    source.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
    source.decoder = decoders.Metaspace()
    pieces = pieces_of(source)
    assert decode(pieces, [0, 1, 0]) == source.decode([0, 1, 0]) == "ab a"


def plain_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition: the stop that is complete first, the longest of those."""
    for end in range(1, len(text) + 1):
        for stop in sorted(set(stops), key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


WORDS = st.text(alphabet="ab", min_size=1, max_size=4)


@given(
    text=st.text(alphabet="ab", max_size=40),
    stops=st.lists(WORDS, max_size=4),
    sizes=CUTS,
    include=st.booleans(),
)
def test_stop_strings_are_found_across_any_cut_and_nothing_of_one_leaks(
    text, stops, sizes, include
):
    finder = StopFinder(stops, include)
    shown = ""
    wanted, stop = plain_stop(text, stops, include)
    for piece in cut(text, sizes):
        shown += finder.feed(piece)
        assert wanted.startswith(shown)
    if finder.found is None:
        shown += finder.flush()
    assert (shown, finder.found) == (wanted, stop)


def read(pieces, opened=False):
    reader = ReasoningReader(opened)
    parts = [reader.feed(p) for p in pieces] + [reader.flush()]
    return Parts("".join(p.reasoning for p in parts), "".join(p.content for p in parts))


@given(
    text=st.lists(
        st.sampled_from(["<think>", "</think>", "<", "/", "think", ">", " ", "\n", "a", "b"]),
        max_size=20,
    ).map("".join),
    sizes=CUTS,
    opened=st.booleans(),
)
def test_reasoning_is_split_the_same_however_the_text_is_cut(text, sizes, opened):
    assert read(cut(text, sizes), opened) == read([text], opened)


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>\nhm\n</think>\n\nSo.", False, "hm", "So."),
        ("hm\n</think>\n\nSo.", True, "hm", "So."),
        ("\n<think>hm", False, "hm", ""),
        ("So <think> not.", False, "", "So <think> not."),
        ("<thin air", False, "", "<thin air"),
        ("<think></think>So.", False, "", "So."),
        ("a  b </thin </think> c", True, "a  b </thin", "c"),
        ("", True, "", ""),
    ],
)
def test_reasoning_and_content_are_told_apart(text, opened, reasoning, content):
    assert read([text], opened) == Parts(reasoning, content)


def test_a_prompt_may_open_the_reasoning():
    assert is_opened("<|assistant|><think>\n")
    assert not is_opened("<|assistant|><think>\n\n</think>\n\n")


def outputs(ids, sizes, reason=FinishReason.STOP):
    pieces = cut(ids, sizes)
    return [
        RequestOutput("r", tuple(p), reason if i == len(pieces) - 1 else None)
        for i, p in enumerate(pieces)
    ]


@given(
    text=st.sampled_from(["<think>hm</think>answer STOP more", "plain answer", "é漢🙂 STOP"]),
    sizes=CUTS,
    stop=st.sampled_from([[], ["STOP"], ["a"]]),
    reads=st.booleans(),
)
def test_an_answer_is_the_same_however_the_engine_groups_its_tokens(
    tokenizer, text, sizes, stop, reads
):
    def run(pieces):
        answer = Answer(
            tokenizer.detokenizer(), StopFinder(stop), ReasoningReader() if reads else None
        )
        parts = []
        for output in outputs([*tokenizer.encode(text, False), 0], pieces):
            parts.append(answer.feed(output))
            if answer.finish_reason is not None:
                break
        return (
            "".join(p.reasoning for p in parts),
            "".join(p.content for p in parts),
            answer.num_tokens,
            answer.num_reasoning_tokens,
            answer.stop_reason,
            answer.finish_reason,
        )

    assert run(sizes) == run([1] * 100)


def test_a_stop_string_ends_an_answer_and_counts_its_tokens(tokenizer):
    answer = Answer(tokenizer.detokenizer(), StopFinder(["cd"]))
    parts = answer.feed(RequestOutput("r", tuple(tokenizer.encode("abcdef", False))))
    assert parts.content == "ab"
    assert (answer.num_tokens, answer.stop_reason) == (4, "cd")
    assert answer.finish_reason is FinishReason.STOP


def test_stop_strings_do_not_count_before_min_tokens(tokenizer):
    answer = Answer(tokenizer.detokenizer(), StopFinder(["ab"]), min_tokens=3)
    parts = answer.feed(RequestOutput("r", tuple(tokenizer.encode("ababab", False))))
    assert parts.content == "abab"
    assert answer.num_tokens == 6


def test_an_answer_cut_by_length_shows_a_broken_character_as_such(tokenizer):
    answer = Answer(tokenizer.detokenizer(), StopFinder([]))
    ids = tokenizer.encode("a🙂", False)[:-1]
    parts = answer.feed(RequestOutput("r", tuple(ids), FinishReason.LENGTH))
    assert parts.content == "a\ufffd"


def test_the_tokenizer_reads_its_template_from_any_of_its_places(tmp_path, tokenizer_folder):
    text = (tokenizer_folder / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text)
    assert TextTokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert TextTokenizer(tmp_path).apply_chat_template([]) == "json"
    named = [{"name": "default", "template": "config"}, {"name": "rag", "template": "x"}]
    config = {"chat_template": named, "eos_token": {"content": "<|end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert TextTokenizer(tmp_path).apply_chat_template([]) == "config"
    assert TextTokenizer(tmp_path).eos_token_id == 0
    (tmp_path / "chat_template.jinja").write_text("file")
    assert TextTokenizer(tmp_path).apply_chat_template([]) == "file"
    assert TextTokenizer(tmp_path, "given").apply_chat_template([]) == "given"
