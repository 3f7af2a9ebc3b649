"""The vocabulary of a GGUF file: byte-level BPE, and BPE by the scores of SentencePiece.

Knows the keys under `tokenizer.`; reads no tensors. What is in the file but nowhere written down,
such as the expressions that cut text into words, is in `vllm_server.text.pretokenizers`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, cast

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from vllm_models.gguf.header import GgufHeader, read_header
from vllm_models.gguf.metadata import Metadata

from vllm_server.text.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from vllm_server.text.vocabulary import Vocabulary

SPACE = "\u2581"  # what SentencePiece writes for a space
MAX_TOKEN_CHARS = 4096  # ways to cut a token in two are tried one by one
_KEY = "tokenizer.ggml."


class TokenType(IntEnum):
    """What `tokenizer.ggml.token_type` says of a token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_SPECIAL = (TokenType.UNKNOWN, TokenType.CONTROL)
_PHI3_BARE = ("<unk>", "<s>", "<|endoftext|>")


class _Tokens(NamedTuple):
    """The vocabulary as the file has it.

    Attributes:
        metadata: Of the file.
        texts: By id.
        types: By id.
    """

    metadata: Metadata
    texts: list[str]
    types: list[int]

    def special_id(self, name: str, default: int | None = None) -> int | None:
        """The id under `tokenizer.ggml.<name>_token_id`."""
        key = f"{_KEY}{name}_token_id"
        found = self.metadata.find(key, int)
        if found is not None and not 0 <= found < len(self.texts):
            raise self.metadata.error(key, f"is {found}, but there are {len(self.texts)} tokens")
        return default if found is None else found

    def flag(self, name: str, default: bool) -> bool:
        """The value under `tokenizer.ggml.<name>`."""
        return self.metadata.get(_KEY + name, bool, default)


class _Style(NamedTuple):
    """What one kind of tokenizer takes for granted where a file does not say.

    Attributes:
        source: Without added tokens.
        bos: Id of the beginning-of-sequence token.
        eos: Id of the end-of-sequence token.
        adds_bos: Whether a text begins with the former.
        may_say: Whether a file may say otherwise.
    """

    source: tokenizers.Tokenizer
    bos: int | None
    eos: int | None
    adds_bos: bool
    may_say: bool = True


def read_gguf(path: Path) -> Vocabulary:
    """The vocabulary of a GGUF file, or of the set that it is a part of.

    Raises:
        ModelError: The file is damaged, has no tokenizer, or one of an unknown kind.
    """
    return vocabulary_of(read_header(path, tensors=False))


def vocabulary_of(header: GgufHeader) -> Vocabulary:
    """The vocabulary that a file's metadata describes.

    Raises:
        ModelError: There is none, it contradicts itself, or its kind is unknown.
    """
    metadata = Metadata(header)
    model = metadata.need(f"{_KEY}model", str)
    if model not in TOKENIZER_MODELS:
        raise metadata.error(
            f"{_KEY}model", f"is {model!r}, but must be one of {list(TOKENIZER_MODELS)}"
        )
    tokens = _read_tokens(metadata)
    style = TOKENIZER_MODELS[model](tokens)
    # The library declares lists of nothing.
    style.source.add_special_tokens(_special_tokens(tokens))  # pyright: ignore[reportUnknownMemberType]
    style.source.add_tokens(_user_tokens(tokens))  # pyright: ignore[reportUnknownMemberType]
    bos, eos = tokens.special_id("bos", style.bos), tokens.special_id("eos", style.eos)
    _surround(style, tokens, bos, eos)
    return Vocabulary(
        style.source,
        None if bos is None else tokens.texts[bos],
        None if eos is None else tokens.texts[eos],
        metadata.find("tokenizer.chat_template", str)
        or metadata.find("tokenizer.chat_template.default", str),
        header.paths[0],
    )


def _read_tokens(metadata: Metadata) -> _Tokens:
    texts = cast("list[str]", _array(metadata, "tokens", str))
    # A token without text still takes up an id.
    texts = [text or f"[EMPTY_{token_id}]" for token_id, text in enumerate(texts)]
    if len(set(texts)) != len(texts):
        [(twice, _)] = Counter(texts).most_common(1)
        raise metadata.error(f"{_KEY}tokens", f"has {twice[:80]!r} twice")
    if len(max(texts, key=len)) > MAX_TOKEN_CHARS:
        raise metadata.error(f"{_KEY}tokens", f"has one of over {MAX_TOKEN_CHARS} characters")
    if not is_text("".join(texts)):
        raise metadata.error(f"{_KEY}tokens", "has one that is not UTF-8")
    types = [int(TokenType.NORMAL)] * len(texts)
    if f"{_KEY}token_type" in metadata.header.metadata:
        types = cast("list[int]", _array(metadata, "token_type", int, len(texts)))
    return _Tokens(metadata, texts, types)


def is_text(text: str) -> bool:
    """Whether a text has no lone surrogates, which stand for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _array(metadata: Metadata, name: str, kind: type, count: int | None = None) -> list[object]:
    """The items of an array; all items of one have the same type."""
    key = _KEY + name
    found = metadata.header.metadata.get(key)
    if not isinstance(found, list) or not found or type(found[0]) is not kind:
        raise metadata.error(key, f"must be an array of {kind.__name__}")
    if count is not None and len(found) != count:
        raise metadata.error(key, f"has {len(found)} items for {count} tokens")
    return cast("list[object]", found)


def _byte_level(tokens: _Tokens) -> _Style:
    """BPE over stand-ins for bytes, inside the words that a named pre-tokenizer cuts."""
    key = f"{_KEY}pre"
    name = tokens.metadata.get(key, str, "default")
    entry = PRE_TOKENIZERS.get(name)
    if entry is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise tokens.metadata.error(key, f"is {name!r}, but only these are known: {known}")
    model = _bpe(tokens, _listed_merges(tokens), ignore_merges=entry.ignores_merges)
    source = tokenizers.Tokenizer(model)
    if entry.composes:
        source.normalizer = normalizers.NFC()
    source.pre_tokenizer = word_splitter(entry)
    source.decoder = decoders.ByteLevel()
    return _Style(source, None, None, entry.adds_bos)


def word_splitter(entry: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """Cuts text into words and writes them in the stand-ins of a byte-level vocabulary."""
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in entry.splits]
    stand_ins = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, stand_ins])


def _scored(tokens: _Tokens) -> _Style:
    """SentencePiece: of all neighbours the pair whose joined token has the best score merges."""
    scores = cast("list[float]", _array(tokens.metadata, "scores", float, len(tokens.texts)))
    source = _sentence_piece(tokens, scored_merges(tokens.texts, tokens.types, scores))
    prefixed = tokens.flag("add_space_prefix", True)
    source.normalizer = space_normalizer(prefixed)
    source.decoder = _space_decoder(prefixed)
    bos, eos = (i if i < len(tokens.texts) else None for i in (1, 2))
    return _Style(source, bos, eos, True)


def _listed(tokens: _Tokens) -> _Style:
    """Merges by rank over plain characters, with SentencePiece's spaces and bytes.

    Such models need their BOS, but there are files that say it is not to be added.
    """
    source = _sentence_piece(tokens, _listed_merges(tokens))
    source.normalizer = space_normalizer(prefixed=False)
    source.decoder = _space_decoder(prefixed=False)
    return _Style(source, None, None, True, may_say=False)


TOKENIZER_MODELS: Mapping[str, Callable[[_Tokens], _Style]] = {
    "gpt2": _byte_level,
    "llama": _scored,
    "gemma4": _listed,
}


def scored_merges(
    texts: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, the best score of the third first.

    Args:
        texts: By id.
        types: By id; special tokens and bytes never take part.
        scores: By id.
    """
    out = (*_SPECIAL, TokenType.BYTE)
    ids = {text: i for i, text in enumerate(texts) if types[i] not in out}
    merges: list[tuple[str, str]] = []
    for text in sorted(ids, key=lambda text: -scores[ids[text]]):
        cuts = ((text[:at], text[at:]) for at in range(1, len(text)))
        pairs = [cut for cut in cuts if cut[0] in ids and cut[1] in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _listed_merges(tokens: _Tokens) -> list[tuple[str, str]]:
    """The file's own merges; a token may begin with a space, but has no other one."""
    lines = cast("list[str]", _array(tokens.metadata, "merges", str))
    return [(line[:at], line[at + 1 :]) for line in lines for at in (line.find(" ", 1),)]


def _sentence_piece(tokens: _Tokens, merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    unknown = tokens.special_id("unknown")
    if unknown is None and TokenType.UNKNOWN in tokens.types:
        unknown = tokens.types.index(TokenType.UNKNOWN)
    model = _bpe(
        tokens,
        merges,
        unk_token=None if unknown is None else tokens.texts[unknown],
        fuse_unk=True,
        byte_fallback=TokenType.BYTE in tokens.types,
    )
    return tokenizers.Tokenizer(model)


def _bpe(tokens: _Tokens, merges: list[tuple[str, str]], **options: object) -> models.BPE:
    vocabulary = {text: token_id for token_id, text in enumerate(tokens.texts)}
    try:
        return models.BPE(vocabulary, merges, **options)
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception
        fault = f"do not fit the tokens: {str(error)[:200]}"
        raise tokens.metadata.error(f"{_KEY}merges", fault) from None


def space_normalizer(prefixed: bool) -> normalizers.Normalizer:
    """Writes spaces as SentencePiece does, one more in front of a text if it is `prefixed`."""
    escape = normalizers.Replace(" ", SPACE)
    if not prefixed:
        return escape
    return normalizers.Sequence([normalizers.Prepend(SPACE), escape])


def _space_decoder(prefixed: bool) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)


def _special_tokens(tokens: _Tokens) -> list[AddedToken]:
    """Found in any text, and left out of shown text.

    Those of Phi-3 also take the space that follows, for which files have no key.
    """
    architecture, model = tokens.metadata.architecture, tokens.metadata.find(f"{_KEY}model", str)
    takes_space = (architecture, model) == ("phi3", "llama")
    return [
        AddedToken(
            text, special=True, normalized=False, rstrip=takes_space and text not in _PHI3_BARE
        )
        for text, kind in zip(tokens.texts, tokens.types, strict=True)
        if kind in _SPECIAL
    ]


def _user_tokens(tokens: _Tokens) -> list[AddedToken]:
    """Found in any text before it is cut into words."""
    return [
        AddedToken(text, special=False, normalized=False)
        for text, kind in zip(tokens.texts, tokens.types, strict=True)
        if kind == TokenType.USER_DEFINED
    ]


def _surround(style: _Style, tokens: _Tokens, bos: int | None, eos: int | None) -> None:
    """Let the file's BOS and EOS stand around every text, where it asks for them."""
    adds_bos = style.adds_bos and bos is not None
    if style.may_say:
        adds_bos = tokens.flag("add_bos_token", adds_bos)
    found: dict[str, int] = {}
    for name, token_id, wanted in (
        ("bos", bos, adds_bos),
        ("eos", eos, tokens.flag("add_eos_token", False)),
    ):
        if wanted and token_id is None:
            raise tokens.metadata.error(f"{_KEY}add_{name}_token", f"needs a {name}_token_id")
        if wanted and token_id is not None:
            found[name] = token_id
    if found:
        around = ["bos"] * ("bos" in found) + ["$A"] + ["eos"] * ("eos" in found)
        style.source.post_processor = processors.TemplateProcessing(
            single=around,
            special_tokens=[
                {"id": name, "ids": [token_id], "tokens": [tokens.texts[token_id]]}
                for name, token_id in found.items()
            ],
        )
