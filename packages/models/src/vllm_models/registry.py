"""Which class runs which architecture, by the name in a checkpoint's `architectures[0]`.

Classes are named as "module:Class" and imported when a checkpoint asks for them. Other packages
add theirs with `register_architecture`, or with an entry point in the group
`vllm_lite.architectures` whose name is the architecture.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

from vllm_traits import ModelError

from vllm_models.components.decoder import Decoder

ENTRY_POINT_GROUP = "vllm_lite.architectures"

_ARCHITECTURES: dict[str, str | type[Decoder]] = {
    "DeepseekV3ForCausalLM": "vllm_models.architectures.deepseek_v3:DeepseekV3ForCausalLM",
    "Gemma2ForCausalLM": "vllm_models.architectures.gemma2:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": "vllm_models.architectures.gemma3:Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration": "vllm_models.architectures.gemma3:Gemma3ForCausalLM",
    "Gemma4ForCausalLM": "vllm_models.architectures.gemma4:Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration": "vllm_models.architectures.gemma4:Gemma4ForCausalLM",
    "Glm4ForCausalLM": "vllm_models.architectures.glm4:Glm4ForCausalLM",
    "Glm4MoeForCausalLM": "vllm_models.architectures.glm4_moe:Glm4MoeForCausalLM",
    "GptOssForCausalLM": "vllm_models.architectures.gpt_oss:GptOssForCausalLM",
    "LlamaForCausalLM": "vllm_models.architectures.llama:LlamaForCausalLM",
    "MistralForCausalLM": "vllm_models.architectures.llama:LlamaForCausalLM",
    "MixtralForCausalLM": "vllm_models.architectures.mixtral:MixtralForCausalLM",
    "Olmo2ForCausalLM": "vllm_models.architectures.olmo2:Olmo2ForCausalLM",
    "Olmo3ForCausalLM": "vllm_models.architectures.olmo3:Olmo3ForCausalLM",
    "Phi3ForCausalLM": "vllm_models.architectures.phi3:Phi3ForCausalLM",
    "Qwen2ForCausalLM": "vllm_models.architectures.qwen2:Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM": "vllm_models.architectures.qwen2_moe:Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM": "vllm_models.architectures.qwen3:Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM": "vllm_models.architectures.qwen3_moe:Qwen3MoeForCausalLM",
}


def register_architecture(name: str, target: str | type[Decoder]) -> None:
    """Make an architecture known to this process; a later registration replaces an earlier one.

    Args:
        name: As in `architectures[0]` of `config.json`.
        target: A subclass of `Decoder`, or where to import one from: "module:Class".

    Raises:
        ValueError: The target is a string of another form.
    """
    if isinstance(target, str) and not all(target.partition(":")):
        raise ValueError(f"target is {target!r}, but must be a class or 'module:Class'")
    _ARCHITECTURES[name] = target


def supported_architectures() -> tuple[str, ...]:
    """Names that can be loaded, those of installed entry points included."""
    return tuple(sorted({*_ARCHITECTURES, *entry_points(group=ENTRY_POINT_GROUP).names}))


def find_architecture(name: str) -> type[Decoder]:
    """The class that runs an architecture.

    Raises:
        ModelError: Nobody registered it, or its module does not have what was promised.
    """
    target = _ARCHITECTURES.get(name) or _entry_point(name)
    if target is None:
        raise ModelError(
            f"The architecture {name!r} is not supported. Supported: "
            f"{', '.join(supported_architectures())}."
        )
    found = _import(name, target) if isinstance(target, str) else target
    if not (isinstance(found, type) and issubclass(found, Decoder)):
        raise ModelError(f"The architecture {name!r} is registered as {found!r}, not a Decoder.")
    return found


def _entry_point(name: str) -> str | None:
    found = entry_points(group=ENTRY_POINT_GROUP, name=name)
    return next((point.value for point in found), None)


def _import(name: str, target: str) -> object:
    module, _, attribute = target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"The architecture {name!r} cannot be imported: {error}.") from error
