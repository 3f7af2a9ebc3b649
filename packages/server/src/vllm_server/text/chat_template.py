"""Conversations to prompts by the model's own template.

Knows which variables a template gets and which a request may set. The sandbox it runs in is
`vllm_server.text.sandbox`; run it off the event loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta
from vllm_traits import InvalidRequestError, ModelError

from vllm_server.text.sandbox import METER, Meter, Sandbox, TemplateLimitError

MAX_SOURCE_BYTES = 256 * 1024
MAX_PROMPT_CHARS = 32 * 1024 * 1024
SMOKE_SECONDS = 1.0

RESERVED = frozenset(
    {
        "messages", "add_generation_prompt", "continue_final_message", "tools", "documents",
        "bos_token", "eos_token", "chat_template", "tokenize", "return_dict", "return_tensors",
        "padding", "truncation", "max_length", "tokenizer_kwargs", "raise_exception",
        "strftime_now", "self", "loop", "caller", "varargs", "kwargs",
    }
)  # fmt: skip

_SMOKE = ({"role": "user", "content": "Hello"},)
_MISFITS = (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError)


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja text.
        bos_token: Value of the template's `bos_token`.
        eos_token: Value of the template's `eos_token`.

    Attributes:
        source: The Jinja text.
        variables: Names the template reads and nobody else sets.

    Raises:
        ModelError: The source is too large, no template, or cannot render one message in time.
    """

    def __init__(self, source: str, bos_token: str | None = None, eos_token: str | None = None):
        if len(source.encode("utf-8", "replace")) > MAX_SOURCE_BYTES:
            raise ModelError(f"The chat template is larger than {MAX_SOURCE_BYTES >> 10} KiB.")
        self.source = source
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        try:
            sandbox = Sandbox()
            self._template = sandbox.bounded(source)
            names = meta.find_undeclared_variables(sandbox.parse(source))
        except TemplateSyntaxError as error:
            raise ModelError(
                f"The chat template has an error in line {error.lineno}: {error.message}."
            ) from None
        except (TemplateError, RecursionError, MemoryError, SyntaxError, ValueError):
            raise ModelError("The chat template cannot be compiled.") from None
        self.variables = frozenset(names) - RESERVED
        self._smoke()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation.

        Args:
            messages: Role, content and whatever else the template reads.
            add_generation_prompt: End with the beginning of the assistant's answer.
            variables: Further variables.

        Raises:
            InvalidRequestError: A variable is reserved, or the template refuses the messages;
                the code is `invalid_messages`.
        """
        variables = variables or {}
        for name in variables:
            if self.is_reserved(name):
                raise InvalidRequestError(
                    f"The template variable {name[:100]!r} is reserved.",
                    param="chat_template_kwargs",
                )
        values = {
            **self._tokens,
            "tools": None,
            "documents": None,
            **variables,
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        return _render(self._template, values, Meter())

    @staticmethod
    def is_reserved(name: str) -> bool:
        """Whether a request may never set a variable of this name."""
        return name in RESERVED or name.startswith("_")

    def _smoke(self) -> None:
        """A template may refuse one message, but must decide in time."""
        values: dict[str, Any] = {**self._tokens, "messages": list(_SMOKE), "tools": None}
        meter = Meter(SMOKE_SECONDS)
        token = METER.set(meter)
        try:
            _collect(self._template, values | {"add_generation_prompt": True}, meter)
        except TemplateLimitError as error:
            raise ModelError(f"The chat template is refused: {error.message}.") from None
        except (RecursionError, MemoryError):
            raise ModelError("The chat template is refused: it nests too deeply.") from None
        except (TemplateError, *_MISFITS):
            pass
        finally:
            METER.reset(token)


def _render(template: Template, values: Mapping[str, Any], meter: Meter) -> str:
    token = METER.set(meter)
    try:
        return _collect(template, values, meter)
    except (RecursionError, MemoryError):
        raise _refused("it nests too deeply or grows too large") from None
    except TemplateError as error:
        raise _refused(str(error.message or "unknown reason")[:300]) from None
    except _MISFITS:
        raise _refused("it does not fit these messages") from None
    finally:
        METER.reset(token)


def _collect(template: Template, values: Mapping[str, Any], meter: Meter) -> str:
    parts: list[str] = []
    num_chars = 0
    for part in template.generate(values):
        meter.spend()
        num_chars += len(part)
        if num_chars > MAX_PROMPT_CHARS:
            raise TemplateLimitError("the prompt grows too large")
        parts.append(part)
    return "".join(parts)


def _refused(reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The chat template refuses the messages: {reason}.",
        code="invalid_messages",
        param="messages",
    )
