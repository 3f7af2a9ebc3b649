"""Which format a checkpoint's quantized layers are in, from its configuration.

Which layers are quantized is said by their tensors. Lists such as `modules_to_not_convert` say the
same, but every producer matches names by rules of its own, so they are not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vllm_traits import ModelError

from vllm_models.components.linear import Dense, Linear, LinearMethod
from vllm_models.json_fields import JsonFields
from vllm_models.quantization.awq import AwqFormat
from vllm_models.quantization.bitsandbytes import BitsAndBytesFormat
from vllm_models.quantization.blocks import GgufScheme
from vllm_models.quantization.compressed_tensors import CompressedTensorsFormat
from vllm_models.quantization.fp8 import Fp8Format
from vllm_models.quantization.gptq import GptqFormat
from vllm_models.quantization.mxfp4 import Mxfp4Format
from vllm_models.quantization.parts import Format, Part
from vllm_models.quantization.separate import Separate
from vllm_models.weights.load import Scheme
from vllm_models.weights.saved import SavedTensor

_FORMATS: Mapping[str, Callable[[JsonFields], Format]] = {
    "awq": AwqFormat.from_fields,
    "bitsandbytes": BitsAndBytesFormat.from_fields,
    "compressed-tensors": CompressedTensorsFormat.from_fields,
    "fp8": Fp8Format.from_fields,
    "gptq": GptqFormat.from_fields,
    "mxfp4": Mxfp4Format.from_fields,
}
SUPPORTED_METHODS = tuple(_FORMATS)


class FormatScheme:
    """Implements `Scheme`: every layer as its checkpoint has it.

    Args:
        form: Of the checkpoint.
    """

    def __init__(self, form: Format) -> None:
        self._format = form

    def method(
        self, names: Sequence[str], layer: Linear, saved: Mapping[str, SavedTensor]
    ) -> LinearMethod | None:
        """One method for all parts if they are alike, else one for each; None is as it is."""
        found = [
            self._format.method(Part(name, width, layer.in_features, saved))
            for name, width in zip(names, layer.parts.values(), strict=True)
        ]
        if all(method == found[0] for method in found):
            return found[0]
        chosen = (Dense() if method is None else method for method in found)
        return Separate(dict(zip(layer.parts, chosen, strict=True)))


def scheme_for(fields: JsonFields) -> Scheme:
    """How the linear layers of a checkpoint hold their weights.

    Args:
        fields: Of `config.json`.

    Raises:
        ModelError: They are quantized in a way that is not supported.
    """
    config = fields.child("quantization_config") or fields.child("compression_config")
    if config is None:
        return GgufScheme()
    name = config.get("quant_method", str, "") or _unnamed(config)
    read = _FORMATS.get(name)
    if read is None:
        raise ModelError(
            f"{config.source}: quant_method {name!r} is not supported. Supported: "
            f"{', '.join(SUPPORTED_METHODS)}."
        )
    return FormatScheme(read(config))


def _unnamed(config: JsonFields) -> str:
    """Old checkpoints leave out the name."""
    if "config_groups" in config.values:
        return "compressed-tensors"
    is_bitsandbytes = {"load_in_4bit", "load_in_8bit"} & config.values.keys()
    return "bitsandbytes" if is_bitsandbytes else ""
