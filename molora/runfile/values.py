"""Checking one value against a type hint, and saying in words what is wrong with it."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError

from molora.errors import one_of
from molora.runfile.document import KeyPath

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
_WORDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
    type(None): ("null", "null"),
    Any: ("a value", "values"),
}
_BOUND_WORDS = (
    (Ge, "of at least {}", "ge"),
    (Gt, "above {}", "gt"),
    (Lt, "below {}", "lt"),
)
_ON = {"on", "yes", "y", "true", "1"}
_OFF = {"off", "no", "n", "false", "0"}


@cache
def adapter(hint: Any) -> TypeAdapter[Any]:
    """The strict validator of a hint: `"8"` and `true` are no numbers, 2.5 is no whole number."""
    return TypeAdapter(hint, config=_STRICT)


def is_valid(value: Any, hint: Any) -> bool:
    """Whether a value read from YAML fits a hint."""
    try:
        adapter(hint).validate_python(value)
    except ValidationError:
        return False
    return True


def mistakes(value: Any, hint: Any) -> Iterator[tuple[KeyPath, str]]:
    """Yield where inside `value`, and why, it does not fit `hint`; nothing if it fits."""
    if is_valid(value, hint):
        return
    variants = _variants(hint)
    for variant in variants:
        if get_origin(variant) is list and isinstance(value, list):
            for index, item in enumerate(value):
                for path, message in mistakes(item, get_args(variant)[0]):
                    yield (index, *path), message
            return
    names = [choice for variant in variants if get_origin(variant) is Literal for choice in get_args(variant)]
    if isinstance(value, str) and names and all(isinstance(name, str) for name in names):
        yield (), one_of(value, names)
        return
    yield (), f"got {show(value)}; must be {describe(hint)}.{_tip(value, variants)}"


def show(value: Any) -> str:
    """A value as it would be written in YAML, shortened."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def describe(hint: Any, plural: bool = False) -> str:
    """A hint in words: `a whole number of at least 1, or null`."""
    if hint in _WORDS:
        return _WORDS[hint][plural]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        # Every number is checked to be finite, so no bound says it.
        bounds = [
            words.format(f"{getattr(note, name):g}")
            for note in arguments[1:]
            for kind, words, name in _BOUND_WORDS
            if isinstance(note, kind)
        ]
        return f"{describe(arguments[0], plural)} {' and '.join(bounds)}"
    if origin is Literal:
        names = [show(name) for name in arguments]
        return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
    if hint is list or origin is list:
        return f"a list of {describe(arguments[0], plural=True)}" if arguments else "a list"
    if hint is dict or origin is dict:
        mapping = "mappings" if plural else "a mapping"
        return f"{mapping} of names to {describe(arguments[1], plural=True)}" if arguments else mapping
    # `bool | None` also reads "true or false", so a comma keeps the alternatives apart.
    return ", or ".join(describe(variant, plural) for variant in _variants(hint))


def _variants(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, null last; the hint itself if it is none."""
    if get_origin(hint) not in (Union, types.UnionType):
        return (hint,)
    return tuple(sorted(get_args(hint), key=lambda variant: variant is type(None)))


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _tip(value: Any, variants: tuple[Any, ...]) -> str:
    """How to write what was probably meant."""
    kinds = {_bare(variant) for variant in variants}
    if isinstance(value, str):
        word = value.strip().lower()
        if bool in kinds and word in _ON | _OFF:
            return f" Write {'true' if word in _ON else 'false'}."
        number = _as_number(value)
        if number is not None and kinds & {int, float}:
            return f" Write {int(number) if number.is_integer() else number}, without quotes or separators."
    elif isinstance(value, float) and not math.isfinite(value):
        return " It must be finite."
    elif isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        return f" Write {int(value)}."
    elif str in kinds and not isinstance(value, list | dict) and value is not None:
        return f" Put it in quotes: '{value if isinstance(value, str) else show(value)}'."
    return ""


def _as_number(text: str) -> float | None:
    try:
        number = float(text.replace("_", "").replace(",", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None
