"""How each kind of byte-level BPE cuts text into words before merging, by its name in GGUF files.

The expressions are those of the models' own tokenizers; they are applied one after the other, each
inside what the earlier ones left. Knows nothing of vocabularies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class PreTokenizer(NamedTuple):
    """What happens to text before the merges.

    Attributes:
        splits: Regular expressions; every match and everything between two matches is a word.
        composes: Whether the text is first brought into Unicode's composed form (NFC).
        ignores_merges: Whether a word that is a token stays whole.
        adds_bos: Whether a text begins with a BOS token where a file does not say.
    """

    splits: tuple[str, ...]
    composes: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_ASCII_SIGNS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
THREE_DIGITS = r"[0-9][0-9][0-9]"
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
_LLAMA3 = "|".join([_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _SIGNS, _SPACES])
_QWEN2 = "|".join([_CONTRACTIONS, _WORDS, r"\p{N}", _SIGNS, _SPACES])
_NO_CONTRACTIONS = "|".join([_WORDS, r"\p{N}", _SIGNS, _SPACES])
_QWEN35 = "|".join(
    [
        _CONTRACTIONS,
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        _SPACES,
    ]
)
_SEED = "|".join([_CONTRACTIONS, _WORDS, r"\p{N}{1}", r" ?[^\s\p{L}\p{N}\r\n]+", _SPACES])


def _cased(ending: str, digits: str, signs: str, but: str = "") -> str:
    """Words of capitals before small letters, each with an optional ending."""
    return "|".join(
        [
            rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}{but}]*[{_LOWER}{but}]+{ending}",
            rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}{but}]+[{_LOWER}{but}]*{ending}",
            digits,
            signs,
            _SPACES,
        ]
    )


_TEKKEN = _cased("", r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*")
_GPT4O = _cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*")
_KIMI = r"[\p{Han}]+|" + _cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}", _SIGNS, r"&&[^\p{Han}]")
_DEEPSEEK3 = "|".join(
    [
        _ASCII_SIGNS + "[A-Za-z]+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        _SPACES,
    ]
)
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_SIGNS = r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"


def _table(groups: Mapping[str, PreTokenizer]) -> Mapping[str, PreTokenizer]:
    return {name: entry for names, entry in groups.items() for name in names.split()}


PRE_TOKENIZERS = _table(
    {
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": PreTokenizer(
            (_LLAMA3,), ignores_merges=True, adds_bos=True
        ),
        "dbrx glm4 chatglm-bpe smaug-bpe": PreTokenizer((_LLAMA3,)),
        "qwen2": PreTokenizer((_QWEN2,), composes=True),
        "deepseek-r1-qwen megrez stablelm2 hunyuan kormo": PreTokenizer((_QWEN2,)),
        "qwen35": PreTokenizer((_QWEN35,), composes=True),
        "ufakzeka": PreTokenizer((_NO_CONTRACTIONS,)),
        "gpt-2 phi-2 exaone4 jais gigachat a.x-4.0 mellum trillion granite-docling": PreTokenizer(
            (GPT2,)
        ),
        "olmo mpt": PreTokenizer((GPT2,), composes=True),
        "smollm starcoder refact codeshell exaone minerva-7b mellum2": PreTokenizer((DIGIT, GPT2)),
        "command-r": PreTokenizer((DIGIT, GPT2), composes=True),
        "gpt-4o llama4 minimax-m2": PreTokenizer((_GPT4O,)),
        "tekken": PreTokenizer((_TEKKEN,), ignores_merges=True, adds_bos=True),
        "kimi-k2": PreTokenizer((_KIMI,)),
        "deepseek-v3 hunyuan-dense": PreTokenizer(
            (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3)
        ),
        "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, DIGIT)),
        "deepseek-llm": PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?[{_DEEPSEEK_LETTERS}]+",
                _DEEPSEEK_SIGNS,
                r"\s+$",
                _CJK,
                r"\p{N}+",
            )
        ),
        "falcon": PreTokenizer((PUNCTUATION, GPT2, THREE_DIGITS)),
        "seed-coder": PreTokenizer((_SEED,)),
        "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", THREE_DIGITS)),
    }
)
