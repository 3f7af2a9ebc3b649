"""Errors that cross a package border, each with a stable code.

The message says what is wrong, why, and what to do; the code is what programs branch on.
"""

from __future__ import annotations


class VllmLiteError(Exception):
    """Base of every error the project raises on purpose."""

    code = "internal_error"


class InvalidRequestError(VllmLiteError):
    """A request that can never run as it stands; nothing was queued.

    Args:
        message: What is wrong, with both values.
        code: Stable word for programs, `invalid_value` unless a more exact one exists.
        param: Name of the offending parameter, or None.
    """

    def __init__(self, message: str, code: str = "invalid_value", param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class ContextLengthError(InvalidRequestError):
    """The prompt leaves no room for a completion.

    Attributes:
        num_prompt_tokens: Length of the prompt in tokens.
        max_model_len: Longest sequence, prompt and completion together, in tokens.
    """

    def __init__(self, num_prompt_tokens: int, max_model_len: int) -> None:
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens, but the prompt has "
            f"{num_prompt_tokens}. Shorten the prompt, or start the server with a larger "
            "--max-model-len if the model allows it.",
            code="context_length_exceeded",
            param="prompt",
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.max_model_len = max_model_len


class QueueFullError(VllmLiteError):
    """The waiting queue is at its limit; trying again later may succeed."""

    code = "server_overloaded"


class ConfigError(VllmLiteError):
    """A setting that cannot work; the process ends with exit code 2."""

    code = "config"


class ModelError(VllmLiteError):
    """A checkpoint that cannot be loaded; the process ends with exit code 3."""

    code = "model"


class DeviceError(VllmLiteError):
    """A device that is missing or too small; the process ends with exit code 4."""

    code = "device"


class BackendError(VllmLiteError):
    """A whole batch failed; what was in flight has to be computed again."""

    code = "engine_unavailable"


class WireError(VllmLiteError):
    """Bytes that are not a frame of ours; the connection they came from is closed."""

    code = "wire"
