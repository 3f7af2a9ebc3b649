"""What each token id is in bytes, so that text can be put together one token at a time.

Knows the decoders of the `tokenizers` library that work token by token (byte-level, and those that
come from SentencePiece). Knows nothing of streams; a decoder outside that family has no pieces.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import tokenizers
from tokenizers import decoders

ToBytes = Callable[[str], bytes]


def _byte_alphabet() -> Mapping[str, int]:
    """The printable stand-ins that byte-level vocabularies use for the 256 bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(rest)}}


_ALPHABET = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    """A token of a byte-level vocabulary; one with any other character stands for itself."""
    try:
        return bytes([_ALPHABET[c] for c in token])
    except KeyError:
        return token.encode()


def is_byte_token(token: str) -> bool:
    """Whether a token stands for one byte, such as `<0x0A>`."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _fallback_byte(token: str) -> bytes | None:
    """The byte that a token such as `<0x0A>` stands for."""
    if not is_byte_token(token):
        return None
    try:
        return bytes([int(token[3:5], 16)])
    except ValueError:
        return None


class Pieces:
    """Bytes of token ids, looked up once per id.

    Attributes:
        strips_first: Spaces that the decoder drops from the start of a text.
    """

    def __init__(self, source: tokenizers.Tokenizer, to_bytes: ToBytes, strips_first: int) -> None:
        self.strips_first = strips_first
        self._source = source
        self._to_bytes = to_bytes
        self._known: dict[int, bytes] = {}
        added = source.get_added_tokens_decoder()
        special = {entry.content for entry in added.values() if entry.special}
        self.special_ids = frozenset(i for i, entry in added.items() if entry.content in special)

    def __getitem__(self, token_id: int) -> bytes:
        """The bytes of one token; empty for an id outside the vocabulary."""
        piece = self._known.get(token_id)
        if piece is None:
            token = self._source.id_to_token(token_id) if token_id >= 0 else None
            piece = b"" if token is None else self._to_bytes(token)
            self._known[token_id] = piece
        return piece


def pieces_of(source: tokenizers.Tokenizer) -> Pieces:
    """The pieces of a tokenizer.

    Raises:
        ValueError: Its decoder does not work token by token; names the decoder.
    """
    steps = _steps(_described(source.decoder))
    kinds = [step["type"] for step in steps]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return Pieces(source, _byte_level, 0)
    if kinds == ["Metaspace"]:
        step = steps[0]
        strips = 0 if step.get("prepend_scheme") == "never" else 1
        return Pieces(source, _replacing([(step["replacement"], " ")], bytes_too=False), strips)
    return _sentence_piece(source, steps)


def _described(decoder: decoders.Decoder | None) -> dict[str, Any] | None:
    """What `tokenizer.json` says of a decoder; the whole file would take a second to write out."""
    return None if decoder is None else json.loads(cast("bytes", decoder.__getstate__()))


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [inner for step in decoder["decoders"] for inner in _steps(step)]
    return [decoder]


def _sentence_piece(source: tokenizers.Tokenizer, steps: Sequence[dict[str, Any]]) -> Pieces:
    """Replacements, then bytes, then at most one strip of the start after everything is joined."""
    changes: list[tuple[str, str]] = []
    strips = 0
    bytes_too = fused = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                changes.append((old, new))
            case {"type": "ByteFallback"}:
                bytes_too = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if fused:
                strips = start
            case _:
                raise ValueError(f"the decoder step {step['type']} is not supported")
    if not steps:
        raise ValueError("the tokenizer has no decoder")
    return Pieces(source, _replacing(changes, bytes_too), strips)


def _replacing(changes: Sequence[tuple[str, str]], bytes_too: bool) -> ToBytes:
    def to_bytes(token: str) -> bytes:
        byte = _fallback_byte(token) if bytes_too else None
        if byte is not None:
            return byte
        for old, new in changes:
            token = token.replace(old, new)
        return token.encode()

    return to_bytes
