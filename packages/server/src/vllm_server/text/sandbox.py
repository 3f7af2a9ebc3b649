"""The one Jinja environment: immutable, sandboxed, and bounded in work and size.

Templates come from model folders, which are not trusted: every loop step and call is counted
against a budget, and no operation may build a large text at once.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, cast

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEXT = 32 * 1024 * 1024
MAX_COUNT = 100_000
MAX_STEPS = 2_000_000
MAX_SECONDS = 2.0

_WRITERS = frozenset(
    {
        "string", "pprint", "upper", "lower", "trim", "title", "capitalize", "replace", "escape",
        "e", "forceescape", "safe", "striptags", "truncate", "wordcount", "urlencode", "urlize",
    }
)  # fmt: skip
MAX_INDENT = 16
_WIDE = re.compile(r"\d{5,}")


class TemplateLimitError(TemplateError):
    """A template that does too much."""


class Meter:
    """What one render has used.

    Args:
        seconds: Longest time from now.
    """

    def __init__(self, seconds: float = MAX_SECONDS) -> None:
        self._deadline = time.monotonic() + seconds
        self._steps = 0

    def spend(self) -> None:
        """Count one step.

        Raises:
            TemplateLimitError: The budget of steps or time is used up.
        """
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise TemplateLimitError("the chat template takes too many steps")
        if self._steps % 1024 == 0:
            self.check_time()

    def check_time(self) -> None:
        """Raise if the time is over."""
        if time.monotonic() > self._deadline:
            raise TemplateLimitError("the chat template takes too long")


METER: ContextVar[Meter] = ContextVar("METER")


def _check_size(num_chars: int) -> None:
    if num_chars > MAX_TEXT:
        raise TemplateLimitError("the chat template builds a text that is too large")


def _check_arguments(args: Iterable[Any]) -> None:
    """No widths or counts that pad a text to any length."""
    for arg in args:
        if isinstance(arg, int) and abs(arg) > MAX_COUNT:
            raise TemplateLimitError("the chat template uses a number that is too large")


def _weigh(value: Any, left: int = MAX_TEXT) -> int:
    """What is left of a size after the texts in a value, however deep.

    Raises:
        TemplateLimitError: Nothing is left.
    """
    if isinstance(value, str):
        left -= len(value)
    elif isinstance(value, dict):
        for key, inner in cast("dict[Any, Any]", value).items():
            left = _weigh(inner, _weigh(key, left))
    elif isinstance(value, (list, tuple)):
        for inner in cast("list[Any]", value):
            left = _weigh(inner, left)
    if left <= 0:
        _check_size(MAX_TEXT + 1)
    return left - 1


def _weighed(value: Any) -> Any:
    """A value that is about to be written, if it is not too large."""
    if isinstance(value, (dict, list, tuple)):
        _weigh(value)
    return value  # pyright: ignore[reportUnknownVariableType]


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple)) else 1  # pyright: ignore[reportUnknownArgumentType]


def _check_growth(name: str, subject: Any, args: tuple[Any, ...]) -> None:
    """Texts that `replace`, `join` and `format` would build."""
    if name == "replace" and isinstance(subject, str) and len(args) > 1:
        times = subject.count(str(args[0])) if args[0] else len(subject) + 1
        _check_size(len(subject) + times * len(str(args[1])))
    elif name == "join" and args:
        items, separator = (args[0], subject) if isinstance(subject, str) else (subject, args[0])
        _weigh(items)
        _check_size(_size(items) * _size(separator))
    elif name in ("format", "format_map") and isinstance(subject, str) and _WIDE.search(subject):
        raise TemplateLimitError("the chat template formats a text that is too wide")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as the chat templates of model authors expect it, within limits."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=_weighed
        )
        self.filters = {name: _guarded(name, f) for name, f in self.filters.items()}
        self.filters.update(tojson=_to_json, _counted=_counted, _concatenated=_concatenated)
        variables = cast("dict[str, Any]", self.globals)  # pyright: ignore[reportUnknownMemberType]
        del variables["lipsum"]
        variables.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

    def bounded(self, source: str) -> Template:
        """Compile a template in which every loop step is counted.

        Raises:
            TemplateError: The source is no template.
        """
        tree = self.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None)
        tree = _without_concat(tree)
        tree.set_environment(self)
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Call something from a template."""
        METER.get().spend()
        _check_arguments((*args, *kwargs.values()))
        method = getattr(obj, "__wrapped__", obj)  # Jinja wraps `str.format`
        _check_growth(getattr(method, "__name__", ""), getattr(method, "__self__", None), args)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `*`, `**`, `+` or `%` from a template."""
        METER.get().spend()
        if operator == "*":
            factors = [x if isinstance(x, int) else _size(x) for x in (left, right)]
            _check_size(abs(factors[0] * factors[1]))
        elif operator == "+":
            _check_size(_size(left) + _size(right))
        elif operator == "**":
            _check_arguments((left, right if not isinstance(right, int) else right * 1000))
        elif isinstance(left, str) and (_WIDE.search(left) or "*" in left):
            raise TemplateLimitError("the chat template formats a text that is too wide")
        return super().call_binop(context, operator, left, right)


def _without_concat(tree: nodes.Template) -> nodes.Template:
    """Replace `a ~ b` by a filter that looks at the sizes; inner ones first."""

    def visit(node: nodes.Node) -> nodes.Node:
        for name, value in node.iter_fields():
            if isinstance(value, list):
                items = cast("list[Any]", value)
                setattr(node, name, [visit(x) if isinstance(x, nodes.Node) else x for x in items])
            elif isinstance(value, nodes.Node):
                setattr(node, name, visit(value))
        if isinstance(node, nodes.Concat):
            return nodes.Filter(nodes.List(node.nodes), "_concatenated", [], [], None, None)
        return node

    return cast("nodes.Template", visit(tree))


def _guarded(name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at its arguments first, keeping the marks Jinja put on it."""
    subject_at = 1 if hasattr(apply, "jinja_pass_arg") else 0

    def guarded(*args: Any, **kwargs: Any) -> Any:
        METER.get().spend()
        given = args[subject_at + 1 :]
        _check_arguments((*given, *kwargs.values()))
        subject = args[subject_at] if len(args) > subject_at else None
        if name in _WRITERS:
            _weighed(subject)
        _check_growth(name, subject, given)
        return apply(*args, **kwargs)

    guarded.__dict__.update(getattr(apply, "__dict__", {}))
    return guarded


def _counted(items: Any) -> Any:
    """Counts the steps of a loop; a text, list or tuple stays indexable for `loop.length`."""
    meter = METER.get()

    def steps() -> Iterator[Any]:
        for item in items:
            meter.spend()
            yield item

    return steps()


def _concatenated(parts: list[Any]) -> str:
    METER.get().spend()
    texts = [str(_weighed(part)) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as model authors trained on it: plain, without the escapes meant for HTML."""
    _weighed(value)
    if indent is not None and indent > MAX_INDENT:
        raise TemplateLimitError("the chat template indents too far")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return time.strftime(form)
