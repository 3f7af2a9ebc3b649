"""Fill a model's parameters from a checkpoint, and say everything that does not fit at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from vllm_traits import DeviceError, ModelError

from vllm_models.components.decoder import Decoder
from vllm_models.components.linear import Linear
from vllm_models.config import ModelConfig
from vllm_models.options import LoadProgress, OnProgress
from vllm_models.weights.checkpoint import open_weights, weight_files

_SAVED_DTYPES = ("F32", "F16", "BF16", "F64")
_MAX_LISTED = 20


def build_model(
    architecture: type[Decoder], config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Decoder:
    """A model with uninitialised parameters of the wanted type on the wanted device.

    Raises:
        DeviceError: They do not fit.
    """
    with torch.device("meta"):
        model = architecture(config)
    try:
        _materialise(model, dtype, device)
    except RuntimeError as error:
        num_bytes = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
        raise DeviceError(f"The weights need {num_bytes} bytes, which do not fit.") from error
    return model.eval()


def _materialise(model: Decoder, dtype: torch.dtype, device: torch.device) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = dtype if parameter.is_floating_point() else parameter.dtype
            empty = torch.empty(parameter.shape, dtype=kind, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def load_weights(model: Decoder, folder: Path, on_progress: OnProgress) -> None:
    """Copy every tensor of the checkpoint to its place.

    Raises:
        ModelError: Lists every tensor that is missing, unexpected, doubled, or of a wrong shape or
            type.
    """
    files = weight_files(folder)
    faults = _Faults(dict(_places(model)))
    total, done = sum(path.stat().st_size for path in files) or 1, 0
    for path in files:
        on_progress(LoadProgress("load", done / total, path.name))
        with open_weights(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - an open file is no mapping
                place = faults.check(name, tensors.get_slice(name))
                if place is not None:
                    place.copy_(tensors.get_tensor(name))
        done += path.stat().st_size
    faults.report(folder)
    on_progress(LoadProgress("load", 1.0, f"{len(files)} files"))


def _places(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Where each tensor of the checkpoint goes: a parameter, or some rows of a stacked one."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            parts = module.parts if isinstance(module, Linear) else {}
            if not parts:
                yield f"{path}.{name}", parameter.data
                continue
            rows = parameter.data.split(list(parts.values()))
            parent = path.rpartition(".")[0]
            for part, place in zip(parts, rows, strict=True):
                yield f"{parent}.{part}.{name}", place


@dataclass
class _Faults:
    """Compares what a checkpoint has with what a model needs."""

    places: dict[str, Tensor]
    seen: set[str] = field(default_factory=set)
    unexpected: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def check(self, name: str, saved: object) -> Tensor | None:
        """Where a saved tensor goes, or None if it goes nowhere."""
        name = self._spelled(name)
        place = self.places.get(name)
        if place is None:
            if not self._harmless(name):
                self.unexpected.append(name)
            return None
        shape, dtype = tuple(saved.get_shape()), saved.get_dtype()  # type: ignore[attr-defined]
        if name in self.seen:
            self.wrong.append(f"{name} is there twice")
        elif shape != tuple(place.shape):
            self.wrong.append(f"{name} is {list(shape)}, but must be {list(place.shape)}")
        elif dtype not in _SAVED_DTYPES:
            self.wrong.append(f"{name} is saved as {dtype}, which needs a method that is not there")
        else:
            self.seen.add(name)
            return place
        self.seen.add(name)
        return None

    def _spelled(self, name: str) -> str:
        """Checkpoints of embedding models leave out the prefix of the body."""
        return (
            name if name in self.places or f"model.{name}" not in self.places else f"model.{name}"
        )

    def _harmless(self, name: str) -> bool:
        """Derived values that old checkpoints carry, and the second copy of a tied head."""
        tied = name == "lm_head.weight"
        return tied or name.endswith(("rotary_emb.inv_freq", "rotary_emb.cos_cached"))

    def report(self, folder: Path) -> None:
        """Raise if anything was wrong."""
        missing = sorted(self.places.keys() - self.seen)
        lists = {"missing": missing, "unexpected": sorted(self.unexpected), "wrong": self.wrong}
        lines = [f"{title}: {_listed(names)}" for title, names in lists.items() if names]
        if lines:
            raise ModelError(f"The weights in {folder} do not fit the model. " + " ".join(lines))


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_LISTED])
    more = len(names) - _MAX_LISTED
    return f"{shown} and {more} more." if more > 0 else f"{shown}."
