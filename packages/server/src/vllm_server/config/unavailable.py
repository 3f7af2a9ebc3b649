"""Names that other engines and later versions use for features this version does not have.

They are refused with a sentence instead of being accepted and ignored; a value that asks for what
happens anyway (one device) passes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unavailable:
    """A feature that is not there yet.

    Attributes:
        feature: What the user would get, for the message.
        flags: Every spelling of the flag.
        keys: YAML paths.
        env: Well-known environment variables.
        neutral: Values, as lower-case text, that ask for nothing beyond what this version does.
        switch: Whether the flag takes no value.
    """

    feature: str
    flags: tuple[str, ...]
    keys: tuple[str, ...]
    env: tuple[str, ...] = ()
    neutral: tuple[str, ...] = ()
    switch: bool = False

    @property
    def variables(self) -> tuple[str, ...]:
        """Every environment variable that would set it, those of our own prefix included."""
        own = (f"VLLM_LITE_{key.replace('.', '_')}".upper() for key in self.keys)
        return (*self.env, *own)

    def refuses(self, raw: object) -> bool:
        """Whether the value asks for the feature; null never does."""
        return raw is not None and _text(raw) not in self.neutral

    @property
    def message(self) -> str:
        """The sentence that refuses it."""
        rest = f" Only {' or '.join(self.neutral)} is accepted." if self.neutral else ""
        return f"{self.feature} is not available in this version.{rest}"


def _text(raw: object) -> str:
    if isinstance(raw, list):
        return ",".join(str(item) for item in raw)  # pyright: ignore[reportUnknownVariableType,reportUnknownArgumentType]
    return str(raw).strip().lower()


_OFF = ("false",)

UNAVAILABLE = (
    Unavailable("Speculation with a draft model", ("--draft-model",), ("engine.draft_model",)),
    Unavailable(
        "Running on another device than the first",
        ("--device-ids", "--d"),
        ("engine.device_ids", "engine.d"),
        neutral=("0",),
    ),
    Unavailable(
        "Tensor parallelism",
        ("--tensor-parallel-size", "-tp"),
        ("engine.tensor_parallel_size",),
        ("VLLM_TENSOR_PARALLEL_SIZE",),
        neutral=("1",),
    ),
    Unavailable(
        "The prefill server of a prefill/decode pair",
        ("--pd-server",),
        ("pd.server",),
        neutral=_OFF,
        switch=True,
    ),
    Unavailable(
        "The decode client of a prefill/decode pair",
        ("--pd-client",),
        ("pd.client",),
        neutral=_OFF,
        switch=True,
    ),
    Unavailable(
        "A prefill/decode pair",
        ("--pd-url", "--pd-role", "--pd-secret"),
        ("pd.url", "pd.role", "pd.secret"),
        ("VLLM_PD_SECRET",),
    ),
    Unavailable("A port of its own for metrics", ("--metrics-port",), ("server.metrics_port",)),
)
