"""Which type each weight of a model gets: the mixtures of llama.cpp, by their names.

A mixture has a type for most weights and better ones where errors hurt more: the output head, the
values of attention and the way out of the MLP, the latter two in all or some of the layers.

| Mixture | most | output head | values | MLP out | attention out | fused q, k, v |
| q2_k   | Q2_K | Q6_K | Q4_K, or Q3_K if under 4 heads share one | Q3_K | Q3_K | - |
| q3_k_s | Q3_K | Q6_K | - | - | - | - |
| q3_k_m | Q3_K | Q6_K | Q5_K in two layers, then Q4_K | Q5_K first, then some Q4_K | Q4_K | Q4_K |
| q3_k_l | Q3_K | Q6_K | Q5_K | Q5_K | Q5_K | Q4_K |
| q4_k_s | Q4_K | Q6_K | Q5_K in four layers | Q5_K in the first eighth | - | - |
| q4_k_m | Q4_K | Q6_K | Q6_K in some | Q6_K in some | - | Q5_K |
| q5_k_s | Q5_K | Q6_K | - | - | - | - |
| q5_k_m | Q5_K | Q6_K | Q6_K in some | Q6_K in some | - | Q6_K |
| others | their own | Q6_K, or Q8_0 for q8_0 | - | - | - | - |

"In some" is the first and the last eighth of the layers, and every third between. Models of 8
experts share few values and keys, so these have Q8_0 in every mixture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

from vllm_traits import ConfigError

from vllm_models.gguf.types import GgmlType, block_size

_LAYER = re.compile(r"layers\.(\d+)\.", re.ASCII)
_EXPERT = re.compile(r"experts\.(\d+)\.", re.ASCII)
_ROLES = {
    "lm_head": "output",
    "embed_tokens": "embedding",
    "v_proj": "values",
    "k_proj": "keys",
    "qkv_proj": "fused",
    "o_proj": "attention_out",
    "down_proj": "mlp_out",
    "w2": "mlp_out",
}
_ROUTERS = ("gate", "router", "shared_expert_gate", "proj")


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


class Shape(NamedTuple):
    """What a mixture asks about a model.

    Attributes:
        num_layers: Of the body.
        share: Query heads for each key and value.
        num_experts: 0 if there are none.
        tied: The embedding is the output head too.
    """

    num_layers: int
    share: int
    num_experts: int
    tied: bool


class Mixture(NamedTuple):
    """A kind of file.

    Attributes:
        number: `general.file_type`.
        most: Type of weights that are not named.
        roles: Type of others by what they do, given the layer and the model.
    """

    number: int
    most: GgmlType
    roles: Mapping[str, Callable[[int, Shape], GgmlType]] = {}


T = GgmlType


def _some(better: GgmlType, usual: GgmlType) -> Callable[[int, Shape], GgmlType]:
    """Better in the first and last eighth, and in every third layer between."""

    def choose(layer: int, model: Shape) -> GgmlType:
        eighth = model.num_layers // 8
        outer = layer < eighth or layer >= 7 * model.num_layers // 8
        return better if outer or (layer - eighth) % 3 == 2 else usual

    return choose


def _all(kind: GgmlType) -> Callable[[int, Shape], GgmlType]:
    return lambda layer, model: kind


def _first(count: int, better: GgmlType, usual: GgmlType) -> Callable[[int, Shape], GgmlType]:
    return lambda layer, model: better if layer < count else usual


def _mlp_out_3(layer: int, model: Shape) -> GgmlType:
    return T.Q5_K if layer < model.num_layers // 16 else _some(T.Q4_K, T.Q3_K)(layer, model)


MIXTURES: Mapping[str, Mixture] = {
    "f32": Mixture(0, T.F32),
    "f16": Mixture(1, T.F16),
    "q4_0": Mixture(2, T.Q4_0),
    "q4_1": Mixture(3, T.Q4_1),
    "q8_0": Mixture(7, T.Q8_0),
    "q5_0": Mixture(8, T.Q5_0),
    "q5_1": Mixture(9, T.Q5_1),
    "q2_k": Mixture(
        10,
        T.Q2_K,
        {
            "values": lambda layer, model: T.Q4_K if model.share >= 4 else T.Q3_K,
            "mlp_out": _all(T.Q3_K),
            "attention_out": _all(T.Q3_K),
        },
    ),
    "q3_k_s": Mixture(11, T.Q3_K),
    "q3_k_m": Mixture(
        12,
        T.Q3_K,
        {
            "values": _first(2, T.Q5_K, T.Q4_K),
            "mlp_out": _mlp_out_3,
            "attention_out": _all(T.Q4_K),
            "fused": _all(T.Q4_K),
        },
    ),
    "q3_k_l": Mixture(
        13,
        T.Q3_K,
        {
            "values": _all(T.Q5_K),
            "mlp_out": _all(T.Q5_K),
            "attention_out": _all(T.Q5_K),
            "fused": _all(T.Q4_K),
        },
    ),
    "q4_k_s": Mixture(
        14,
        T.Q4_K,
        {
            "values": _first(4, T.Q5_K, T.Q4_K),
            "mlp_out": lambda layer, model: T.Q5_K if layer < model.num_layers // 8 else T.Q4_K,
        },
    ),
    "q4_k_m": Mixture(
        15,
        T.Q4_K,
        {
            "values": _some(T.Q6_K, T.Q4_K),
            "mlp_out": _some(T.Q6_K, T.Q4_K),
            "fused": _all(T.Q5_K),
        },
    ),
    "q5_k_s": Mixture(16, T.Q5_K),
    "q5_k_m": Mixture(
        17,
        T.Q5_K,
        {
            "values": _some(T.Q6_K, T.Q5_K),
            "mlp_out": _some(T.Q6_K, T.Q5_K),
            "fused": _all(T.Q6_K),
        },
    ),
    "q6_k": Mixture(18, T.Q6_K),
    "bf16": Mixture(32, T.BF16),
}


_SHORT = {"q2k": "q2_k", "q3k": "q3_k_m", "q4k": "q4_k_m", "q5k": "q5_k_m", "q6k": "q6_k"} | {
    "q4": "q4_0",
    "q5": "q5_0",
    "q8": "q8_0",
}
# As --isq shows them; `find_mixture` knows more spellings.
ISQ_NAMES = ("q2k", "q3k", "q4k", "q5k", "q6k", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
_SPELLED = {name.replace("_", ""): name for name in MIXTURES} | _SHORT


def find_mixture(name: str) -> Mixture | None:
    """By its name in any case, with or without underscores, or by a short one such as q4k or q8."""
    spelled = _SPELLED.get(name.lower().replace("_", ""))
    return None if spelled is None else MIXTURES[spelled]


def find_isq(name: str) -> Mixture:
    """What weights are quantized to while loading.

    Raises:
        ConfigError: There is no such mixture, or its weights are no blocks.
    """
    mixture = find_mixture(name)
    if mixture is None or not is_quantized(mixture):
        raise ConfigError(f"isq is {name!r}, but must be one of {', '.join(ISQ_NAMES)}.")
    return mixture


def is_quantized(mixture: Mixture) -> bool:
    """Whether its weights are blocks."""
    return block_size(mixture.most) > 1


def choose_type(mixture: Mixture, name: str, columns: int, model: Shape) -> GgmlType | None:
    """The type of a matrix; None is as it is saved.

    Args:
        mixture: Of the file.
        name: Of the layer in a Hugging Face checkpoint, without ".weight".
        columns: Of the matrix. Rows that are no whole number of blocks of 256 get Q8_0 instead,
            and stay as they are if 32 does not divide them either.
        model: That the matrix is of.
    """
    kind = _wanted(mixture, name, model)
    if kind is None or columns % block_size(kind) == 0:
        return kind
    return T.Q8_0 if columns % block_size(T.Q8_0) == 0 else None


def falls_back(mixture: Mixture, name: str, columns: int, model: Shape) -> bool:
    """Whether a matrix does not get the type it should have, because of its columns."""
    kind = _wanted(mixture, name, model)
    return kind is not None and columns % block_size(kind) != 0


def _wanted(mixture: Mixture, name: str, model: Shape) -> GgmlType | None:
    last = name.rpartition(".")[2]
    role = _ROLES.get(last, "")
    if last in _ROUTERS:
        return None
    if not is_quantized(mixture):
        return mixture.most
    if role == "output" or (role == "embedding" and model.tied):
        return T.Q8_0 if mixture.most == T.Q8_0 else T.Q6_K
    if model.num_experts == 8 and role in ("values", "keys"):
        return T.Q8_0
    choose = mixture.roles.get(role)
    return mixture.most if choose is None else choose(_layer(name), model)


def _layer(name: str) -> int:
    found = _LAYER.search(name)
    return int(found[1]) if found else 0


def shape_of(saved: Mapping[str, _Shaped]) -> Shape:
    """What a mixture asks about a model, from the names and shapes of its tensors."""
    rows = {
        last: max((t.shape[0] for n, t in saved.items() if n.endswith(f"{last}.weight")), default=1)
        for last in ("q_proj", "k_proj")
    }
    return Shape(
        num_layers=_count(_LAYER, saved),
        share=rows["q_proj"] // rows["k_proj"],
        num_experts=_count(_EXPERT, saved),
        tied="lm_head.weight" not in saved,
    )


def _count(pattern: re.Pattern[str], names: Iterable[str]) -> int:
    numbers = (int(found[1]) for name in names if (found := pattern.search(name)))
    return max(numbers, default=-1) + 1
