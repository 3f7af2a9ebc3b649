"""What a checkpoint is to the loader: fields, tensors, and a digest; and how one is opened."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from vllm_traits import ModelError

from vllm_models.json_fields import JsonFields
from vllm_models.weights.saved import SavedTensor


class Checkpoint(Protocol):
    """The files of a model, in whatever format.

    Attributes:
        path: Folder or file, for messages.
        fields: Values as in `config.json` of a Hugging Face checkpoint.
        eos_token_ids: Tokens that end a completion.
    """

    @property
    def path(self) -> Path: ...

    @property
    def fields(self) -> JsonFields: ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    def tensors(self) -> Iterable[SavedTensor]:
        """Every tensor in the order of the files; only headers are read."""
        ...

    def fingerprint(self) -> bytes:
        """A digest of the configuration and of size and samples of the weights."""
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """A folder with safetensors, or a GGUF file.

    Raises:
        ModelError: It is neither, or it is damaged.
    """
    if path.is_dir():
        from vllm_models.weights.safetensors import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path)
    if path.suffix == ".gguf":
        from vllm_models.gguf.checkpoint import GgufCheckpoint

        return GgufCheckpoint(path)
    raise ModelError(f"{path} is neither a folder with a checkpoint nor a .gguf file.")
