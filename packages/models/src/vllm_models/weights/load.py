"""Fill a model's parameters from a checkpoint: rename, split, check everything, then one pass.

Headers are compared with the model before any weight is read, so that everything that does not fit
is reported at once. A layer gets its memory when its first tensor arrives and is packed after its
last, so that no more than a layer or two exist in two forms.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import nn
from vllm_traits import DeviceError, ModelError

from vllm_models.components.decoder import Decoder
from vllm_models.components.experts import Experts
from vllm_models.components.linear import Linear, LinearMethod, Place
from vllm_models.config import ModelConfig
from vllm_models.native.packed import zeros_of
from vllm_models.options import LoadProgress, OnProgress
from vllm_models.weights.checkpoint import Checkpoint
from vllm_models.weights.saved import PLAIN_KINDS, SavedTensor

_MAX_LISTED = 20
_KV_SCALES = ("k_scale", "v_scale", "kv_scale")
_ADVICE = "Download the checkpoint again, or save it again from its source."


class Scheme(Protocol):
    """Decides how each linear layer holds its weight."""

    def method(
        self, names: Sequence[str], layer: Linear, saved: Mapping[str, SavedTensor]
    ) -> LinearMethod | None:
        """How a layer is held; None is as it is.

        Args:
            names: Of the layer's parts in the checkpoint, without suffix.
            layer: With its widths.
            saved: The whole checkpoint by name.
        """
        ...


def load_model(
    architecture: type[Decoder],
    config: ModelConfig,
    checkpoint: Checkpoint,
    scheme: Scheme | None,
    target: tuple[torch.dtype, torch.device],
    on_progress: OnProgress,
) -> Decoder:
    """A model with its weights.

    Args:
        architecture: What to build.
        config: Of the checkpoint.
        checkpoint: Where the weights are.
        scheme: How linear layers hold theirs; None is as they are.
        target: Element type of what is not quantized, and device.
        on_progress: Told about every tensor.

    Raises:
        ModelError: Lists every tensor that is missing, unexpected, doubled, or of a wrong shape,
            type or value.
        DeviceError: The weights do not fit.
    """
    dtype, device = target
    plan = plan_model(architecture, config, checkpoint, scheme, dtype)
    plan.filling.place_buffers(device)
    progress = _Progress(on_progress, sum(whole.num_bytes for whole, _ in plan.tensors))
    try:
        for whole, parts in plan.tensors:
            for part in parts:
                plan.filling.take(part, device)
            whole.release()
            progress.add(whole)
    except (RuntimeError, MemoryError, OSError) as error:
        size = progress.total >> 20
        raise DeviceError(f"The weights ({size} MiB on disk) do not fit: {error}") from error
    return plan.model.eval()


class PlannedModel(NamedTuple):
    """A model without memory whose checkpoint was found to fit it.

    Attributes:
        model: With the methods of its layers.
        tensors: Of the checkpoint, each with the parts that the model takes of it.
        filling: Where these go.
    """

    model: Decoder
    tensors: list[tuple[SavedTensor, list[SavedTensor]]]
    filling: _Filling


def plan_model(
    architecture: type[Decoder],
    config: ModelConfig,
    checkpoint: Checkpoint,
    scheme: Scheme | None,
    dtype: torch.dtype,
) -> PlannedModel:
    """Compare a checkpoint's headers with the model; reads no weight.

    Raises:
        ModelError: As `load_model`, but for wrong values.
    """
    model = build_model(architecture, config, dtype)
    tensors = [(whole, list(model.split(whole, config))) for whole in checkpoint.tensors()]
    parts = [part for _, split in tensors for part in split]
    if scheme is not None:
        _choose_methods(model, scheme, {part.name: part for part in parts})
    filling = _Filling(model)
    filling.check(parts, checkpoint.path)
    return PlannedModel(model, tensors, filling)


def build_model(architecture: type[Decoder], config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """A model without memory, whose parameters will have the wanted type.

    Raises:
        ModelError: Its sizes are beyond all numbers.
    """
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return architecture(config)
    except RuntimeError as error:  # more bytes than can be counted
        raise ModelError(f"{config.fields.source}: no model has such sizes: {error}.") from error
    finally:
        torch.set_default_dtype(usual)


def _choose_methods(model: Decoder, scheme: Scheme, saved: Mapping[str, SavedTensor]) -> None:
    with torch.device("meta"):
        for path, layer in model.named_modules():
            if isinstance(layer, Linear):
                names = [layer.name_of(path, part) for part in layer.parts]
                method = scheme.method(names, layer, saved)
                if method is not None:
                    layer.use(method)


class _Progress:
    """Counts bytes and reports every percent with the rate so far."""

    def __init__(self, report: OnProgress, total: int) -> None:
        self.total = total
        self._report = report
        self._done, self._percent = 0, -1
        self._started = time.monotonic()

    def add(self, tensor: SavedTensor) -> None:
        """One more tensor is in its place."""
        self._done += tensor.num_bytes
        percent = self._done * 100 // max(self.total, 1)
        if percent > self._percent:
            self._percent = percent
            rate = self._done / max(time.monotonic() - self._started, 1e-6) / 1e9
            self._report(LoadProgress("load", percent / 100, f"{rate:.2f} GB/s"))


@dataclass
class _Owner:
    """A module whose own tensors arrive one by one, perhaps a layer of an expert."""

    module: nn.Module
    experts: _Collection | None = None
    left: set[str] = field(default_factory=set)

    def take(self, name: str) -> None:
        """One of its tensors is there; pack the module if it was the last."""
        self.left.discard(name)
        if self.left or not isinstance(self.module, Linear):
            return
        self.module.method.pack(self.module)
        if self.experts is not None:
            self.experts.take(self.module)


@dataclass
class _Collection:
    """Experts of which the linear layers are packed one by one."""

    experts: Experts
    left: set[Linear]

    def take(self, layer: Linear) -> None:
        """Pack all experts if a layer was the last."""
        if layer in self.left:
            self.left.discard(layer)
            if not self.left:
                self.experts.pack()


class _Filling:
    """Where every tensor goes, and what is still to come."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._places: dict[str, tuple[_Owner, Place]] = {}
        self._paths = {path for path, _ in model.named_modules() if path.endswith("attn")}
        collections = _collections(model)
        for path, module in model.named_modules():
            owner = _Owner(module, collections.get(module))
            for name, place in _places(path, module):
                self._places[name] = (owner, place)

    def place_buffers(self, device: torch.device) -> None:
        """Move what was computed and not saved."""
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    def check(self, saved: Sequence[SavedTensor], path: Path) -> None:
        """Raise if anything does not fit; remember which tensors each module waits for."""
        faults = _Faults()
        for tensor in saved:
            name = self._spelled(tensor.name)
            if self._is_kv_scale(tensor):
                place = Place(tensor.shape, PLAIN_KINDS, _check_finite, optional=True)
                self._places[name] = (_Owner(nn.Module()), place)
            if name not in self._places:
                faults.note_unexpected(name, tensor)
                continue
            owner, place = self._places[name]
            faults.compare(name, tensor, place)
            owner.left.add(name)
        needed = {name for name, (_, place) in self._places.items() if not place.optional}
        faults.report(path, needed)

    def take(self, tensor: SavedTensor, device: torch.device) -> None:
        """Keep one tensor, and pack its module if it was the last."""
        name = self._spelled(tensor.name)
        if name not in self._places:
            return
        owner, place = self._places[name]
        _materialise(owner.module, device)
        try:
            place.take(tensor.read())
        except ValueError as error:
            raise ModelError(f"{tensor.source}: {tensor.name} {error}. {_ADVICE}") from error
        owner.take(name)

    def _is_kv_scale(self, tensor: SavedTensor) -> bool:
        """Whether a tensor is one scale for all keys or values of a layer, which its maker chose
        for KV in FP8. It is read and not used: scales here are of a position and head.
        """
        path, _, name = self._spelled(tensor.name).rpartition(".")
        if name not in _KV_SCALES or tensor.shape not in ((), (1,)):
            return False
        return path in self._paths or path.rpartition(".")[0] in self._paths

    def _spelled(self, name: str) -> str:
        """Checkpoints of embedding models leave out the prefix of the body."""
        known = name in self._places or f"model.{name}" not in self._places
        return name if known else f"model.{name}"


def _check_finite(tensor: torch.Tensor) -> None:
    if not tensor.isfinite().all():
        raise ValueError("holds values that are not numbers")


def _collections(model: nn.Module) -> dict[nn.Module, _Collection]:
    """Of every linear layer of an expert."""
    found: dict[nn.Module, _Collection] = {}
    for module in model.modules():
        if isinstance(module, Experts):
            layers = {layer for layer in module.modules() if isinstance(layer, Linear)}
            found |= dict.fromkeys(layers, _Collection(module, layers))
    return found


def _places(path: str, module: nn.Module) -> Iterator[tuple[str, Place]]:
    if isinstance(module, Linear):
        yield from module.places(path)
        return
    for name, parameter in module.named_parameters(recurse=False):
        take = lambda t, name=name: getattr(module, name).copy_(t)  # noqa: E731
        yield f"{path}.{name}" if path else name, Place(tuple(parameter.shape), PLAIN_KINDS, take)


def _materialise(module: nn.Module, device: torch.device) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            shape, dtype = parameter.shape, parameter.dtype
            if device.type == "cpu":  # where what is freed would stay with the process
                empty = zeros_of(shape, dtype)
            else:
                empty = torch.empty(shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))


@dataclass
class _Faults:
    """Everything about a checkpoint that does not fit the model."""

    seen: set[str] = field(default_factory=set)
    unexpected: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def note_unexpected(self, name: str, saved: SavedTensor) -> None:
        """A tensor that goes nowhere, unless it is a known derived value or copy."""
        derived = name.endswith(("rotary_emb.inv_freq", "rotary_emb.cos_cached"))
        if not derived and name != "lm_head.weight":  # the second copy of a tied head
            self.unexpected.append(f"{name} in {Path(saved.source).name}")

    def compare(self, name: str, saved: SavedTensor, place: Place) -> None:
        """Shape and type against what the place wants."""
        wrong = ""
        if name in self.seen:
            wrong = f"{name} is there twice"
        elif saved.shape != place.shape:
            wrong = f"{name} is {list(saved.shape)}, but must be {list(place.shape)}"
        elif saved.kind not in place.kinds:
            wanted = ", ".join(sorted(place.kinds))
            wrong = f"{name} is saved as {saved.kind}, but must be one of {wanted}"
        if wrong:
            self.wrong.append(f"{wrong} (in {Path(saved.source).name})")
        self.seen.add(name)

    def report(self, path: Path, needed: set[str]) -> None:
        """Raise if anything was wrong."""
        missing = sorted(needed - self.seen)
        lists = {"missing": missing, "unexpected": sorted(self.unexpected), "wrong": self.wrong}
        lines = [f"{title}: {_listed(names)}" for title, names in lists.items() if names]
        if lines:
            faults = " ".join(lines)
            raise ModelError(f"The weights in {path} do not fit the model. {faults} {_ADVICE}")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_LISTED])
    more = len(names) - _MAX_LISTED
    return f"{shown} and {more} more." if more > 0 else f"{shown}."


def num_bytes(model: Decoder) -> int:
    """Size of the weights in memory, however they are packed."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())
