"""The keys of a GGUF file that describe a folder's tokenizer: the other direction of reading one.

Refuses what those keys cannot say, instead of writing a file that would give other ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from vllm_traits import ModelError

from vllm_server.text.gguf_tokenizer import (
    MAX_TOKEN_CHARS,
    TokenType,
    scored_merges,
)
from vllm_server.text.pieces import is_byte_token
from vllm_server.text.pretokenizers import (
    DIGIT,
    GPT2,
    PRE_TOKENIZERS,
    PreTokenizer,
)
from vllm_server.text.vocabulary import Vocabulary, read_folder, read_json, token_text

Metadata = dict[str, "str | int | bool | list[str] | list[int] | list[float]"]
_KEY = "tokenizer.ggml."
_SPELLED_OUT = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"


class _Folder(NamedTuple):
    """What the files of a folder say.

    Attributes:
        vocabulary: As it is used.
        document: `tokenizer.json`.
        model: Its part with the tokens and the merges.
        special: Entries of the configuration such as `pad_token`.
    """

    vocabulary: Vocabulary
    document: Mapping[str, Any]
    model: Mapping[str, Any]
    special: Mapping[str, Any]

    def refused(self, what: str) -> ModelError:
        """Why there can be no such file."""
        return ModelError(
            f"{self.vocabulary.path}: {what}, which GGUF files cannot say. The model can be used "
            "as it is; --isq quantizes it while it is loaded."
        )

    def merges(self) -> list[tuple[str, str]]:
        """Pairs in the order of their rank; older files write a pair as one string."""
        found = cast("list[str | list[str]]", self.model["merges"])
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in found]
        return [(left, right) for left, right in pairs]


def tokenizer_metadata(folder: Path, vocab_size: int | None = None) -> Metadata:
    """The `tokenizer.*` keys of a GGUF file for the model in a folder.

    There are no keys for some things, which every reader does in its own way: what a folder puts
    around a text other than one BOS and one EOS, whether special tokens take the spaces beside
    them, and whether SentencePiece's first space also comes after special tokens.

    Args:
        folder: With a `tokenizer.json`.
        vocab_size: Rows of the embedding; tokens up to there that the tokenizer lacks are marked as
            unused. None is as many as the tokenizer has.

    Raises:
        ModelError: The tokenizer is of a kind that the format has no name for, or has more tokens
            than `vocab_size`.
    """
    found = _read(folder)
    texts, types = _tokens(found, vocab_size)
    spelled = _sentence_piece if found.model.get("byte_fallback") else _byte_level
    metadata: Metadata = {
        **spelled(found, texts, types),
        f"{_KEY}tokens": texts,
        f"{_KEY}token_type": types,
        **_special_ids(found),
    }
    if found.vocabulary.template is not None:
        metadata["tokenizer.chat_template"] = found.vocabulary.template
    return metadata


def _read(folder: Path) -> _Folder:
    vocabulary = read_folder(folder)
    document = read_json(folder / "tokenizer.json")
    special = read_json(folder / "special_tokens_map.json")
    special |= read_json(folder / "tokenizer_config.json")
    found = _Folder(vocabulary, document, document["model"], special)
    if found.model.get("type", "BPE") != "BPE":
        raise found.refused(f"the tokenizer is of the kind {found.model['type']}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if found.model.get(key):
            raise found.refused(f"the tokenizer has a {key}")
    return found


def _tokens(found: _Folder, vocab_size: int | None) -> tuple[list[str], list[int]]:
    """Text and type by id; ids without a token are filled up."""
    by_id = {i: text for text, i in found.vocabulary.source.get_vocab(True).items()}
    size = max(by_id) + 1
    if vocab_size is not None and size > vocab_size:
        raise found.refused(f"there are {size} tokens for {vocab_size} rows of the embedding")
    texts = [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size or size)]
    types = [int(TokenType.NORMAL if i in by_id else TokenType.UNUSED) for i in range(len(texts))]
    for i, entry in found.vocabulary.source.get_added_tokens_decoder().items():
        types[i] = TokenType.CONTROL if entry.special else TokenType.USER_DEFINED
    if found.model.get("byte_fallback"):
        for i, text in by_id.items():
            if is_byte_token(text):
                types[i] = TokenType.BYTE
            elif text == found.model.get("unk_token"):
                types[i] = TokenType.UNKNOWN
    if len(max(texts, key=len)) > MAX_TOKEN_CHARS:
        raise found.refused(f"a token has over {MAX_TOKEN_CHARS} characters")
    return texts, [int(kind) for kind in types]


def _byte_level(found: _Folder, texts: Sequence[str], types: Sequence[int]) -> Metadata:
    steps = _steps(found.document.get("pre_tokenizer"), "pretokenizers")
    if "ByteLevel" not in [step.get("type") for step in steps]:
        raise found.refused("the pre-tokenizer is not byte-level")
    entry = PreTokenizer(
        _splits(found, steps), _composes(found), bool(found.model.get("ignore_merges"))
    )
    merges = found.merges()
    if any(" " in left + right for left, right in merges):
        raise found.refused("a merge has a space")
    return {
        f"{_KEY}model": "gpt2",
        f"{_KEY}pre": _name_of(found, entry),
        f"{_KEY}merges": [f"{left} {right}" for left, right in merges],
    }


def _name_of(found: _Folder, wanted: PreTokenizer) -> str:
    """The first name with these steps; merges that are ignored matter least."""
    near = ""
    for name, entry in PRE_TOKENIZERS.items():
        if (entry.splits, entry.composes) == (wanted.splits, wanted.composes):
            near = near or name
            if entry.ignores_merges == wanted.ignores_merges:
                return name
    if not near:
        form = " after composing (NFC)" if wanted.composes else ""
        raise found.refused(f"the pre-tokenizer cuts words by {list(wanted.splits)}{form}")
    return near


def _steps(entry: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer without the sequences they are in."""
    if entry is None:
        return []
    if entry.get("type") == "Sequence":
        inner = cast("list[Mapping[str, Any]]", entry[key])
        return [step for part in inner for step in _steps(part, key)]
    return [entry]


def _composes(found: _Folder) -> bool:
    kinds = [step["type"] for step in _steps(found.document.get("normalizer"), "normalizers")]
    if kinds not in ([], ["NFC"]):
        raise found.refused(f"the normalizer is {kinds}")
    return bool(kinds)


def _splits(found: _Folder, steps: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The expressions that a pre-tokenizer amounts to."""
    splits: list[str] = []
    for step in steps:
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                splits += [GPT2] if step.get("use_regex", True) else []
            case {"type": "Digits"}:
                splits.append(DIGIT if step.get("individual_digits") else DIGIT + "+")
            case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"}:
                splits.append(_spelled(regex))
            case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Removed"} if (
                step.get("invert") and regex.endswith(r"|\s+")
            ):
                # Nothing is removed where every character matches.
                splits.append(_spelled(regex))
            case _:
                raise found.refused(f"the pre-tokenizer has the step {step.get('type')}")
    return tuple(splits)


def _spelled(regex: str) -> str:
    """One spelling for expressions that mean the same."""
    regex = regex.replace("\r", r"\r").replace("\n", r"\n")
    return regex.replace(_SPELLED_OUT, _SHORT)


def _sentence_piece(found: _Folder, texts: Sequence[str], types: Sequence[int]) -> Metadata:
    """As scores if those give the same merges, else as merges over plain characters."""
    prefixed = _prefixes(found)
    merges = found.merges()
    scores = _scores(texts, merges)
    if set(scored_merges(texts, types, scores)) == set(merges):
        return {
            f"{_KEY}model": "llama",
            f"{_KEY}pre": "default",
            f"{_KEY}scores": scores,
            f"{_KEY}add_space_prefix": prefixed,
        }
    adds_bos = _special_ids(found)[f"{_KEY}add_bos_token"]
    if prefixed or not adds_bos or any(" " in left + right for left, right in merges):
        raise found.refused("the merges do not follow from scores")
    return {
        f"{_KEY}model": "gemma4",
        f"{_KEY}merges": [f"{left} {right}" for left, right in merges],
        f"{_KEY}add_space_prefix": False,
    }


def _scores(texts: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[float]:
    """The earlier a token is merged, the better; what is never merged comes last."""
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    return [-float(ranks.get(text, len(ranks))) for text in texts]


def _prefixes(found: _Folder) -> bool:
    """Whether a text gets a space in front; the rest of the steps must be SentencePiece's."""
    normal = _steps(found.document.get("normalizer"), "normalizers")
    cuts = _steps(found.document.get("pre_tokenizer"), "pretokenizers")
    match cuts:
        case [{"type": "Metaspace", "replacement": "\u2581", "split": False} as step] if not normal:
            return step.get("prepend_scheme") != "never"
        case [] | [{"type": "Split", "pattern": {"String": " "}}]:
            pass  # the normalizer leaves no spaces to cut at
        case _:
            normal = []
    match normal:
        case [{"type": "Prepend", "prepend": "\u2581"}, last] if _writes_spaces(last):
            return True
        case [last] if _writes_spaces(last):
            return False
        case _:
            raise found.refused("the tokenizer has bytes to fall back to, but no usual spaces")


def _writes_spaces(step: Mapping[str, Any]) -> bool:
    match step:
        case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
            return True
        case _:
            return False


def _special_ids(found: _Folder) -> Metadata:
    source = found.vocabulary.source
    texts = {
        "bos": found.vocabulary.bos_token,
        "eos": found.vocabulary.eos_token,
        "padding": token_text(found.special.get("pad_token")),
        "unknown": token_text(found.special.get("unk_token")),
    }
    ids = {name: source.token_to_id(text) for name, text in texts.items() if text is not None}
    around = source.encode("", add_special_tokens=True).ids
    adds_bos = around[:1] == [ids.get("bos")]
    return {
        **{f"{_KEY}{name}_token_id": i for name, i in ids.items() if i is not None},
        f"{_KEY}add_bos_token": adds_bos,
        f"{_KEY}add_eos_token": around[adds_bos:][-1:] == [ids.get("eos")],
    }
