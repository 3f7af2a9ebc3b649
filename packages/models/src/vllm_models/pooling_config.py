"""The pooling that a sentence-transformers checkpoint was trained with."""

from __future__ import annotations

from pathlib import Path

from vllm_traits import ModelError, PoolingParams

from vllm_models.json_fields import JsonFields

_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_cls_token": "cls",
}


def default_pooling(folder: Path) -> PoolingParams | None:
    """Pooling of `1_Pooling/config.json`, normalised if `modules.json` says so; None without one.

    Raises:
        ModelError: The checkpoint pools in a way that is not supported.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    fields = JsonFields.read(path)
    wanted = [mode for mode, on in fields.values.items() if mode.startswith("pooling_mode_") and on]
    if len(wanted) != 1 or wanted[0] not in _FLAGS:
        raise ModelError(
            f"{path} asks for {' and '.join(wanted) or 'no pooling'}; one of "
            f"{', '.join(_FLAGS)} is supported."
        )
    return PoolingParams(pooling=_FLAGS[wanted[0]], normalize=_normalises(folder))  # type: ignore[arg-type]


def _normalises(folder: Path) -> bool:
    path = folder / "modules.json"
    return path.is_file() and b"sentence_transformers.models.Normalize" in path.read_bytes()
