"""The fields of a request's body: each is checked as it is described, and described in OpenAPI as it is checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mp_rerank._arguments import TEXT_KEY
from mp_rerank._checks import shown
from mp_rerank.server.refusals import Refused

__all__ = ["Field", "choice", "documents", "flag", "number", "pairs", "read", "schema_of", "strings", "text", "whole"]


@dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
        name: its name in the body.
        check: gives its value as it is used; raises ``ValueError`` with what is wrong with it.
        schema: the same in JSON Schema.
        required: whether it must be there. A field that need not may also be ``null``.
        default: its value when it is not there.
        about: what it means.
    """

    name: str
    check: Callable[[Any], Any]
    schema: dict[str, Any]
    required: bool = False
    default: Any = None
    about: str = ""


def read(fields: Sequence[Field], body: Any) -> dict[str, Any]:
    """The values of ``fields`` in ``body``; what else is in it is ignored."""
    if not isinstance(body, dict):
        raise Refused("invalid", f"the body: a JSON object is needed, not {shown(body)}")
    values = {}
    for field in fields:
        value = body.get(field.name)
        if value is not None:
            try:
                values[field.name] = field.check(value)
            except ValueError as error:
                raise Refused("invalid", f"{field.name}: {error}") from None
        elif field.required:
            raise Refused("invalid", f"{field.name}: it is missing")
        else:
            values[field.name] = field.default
    return values


def schema_of(fields: Sequence[Field]) -> dict[str, Any]:
    """A JSON Schema of a body with ``fields``."""
    properties = {}
    for field in fields:
        inner = dict(field.schema)
        if field.about:
            inner["description"] = field.about
        if field.default is not None:
            inner["default"] = field.default
        if not field.required:
            inner = {**inner, "type": [inner["type"], "null"]} if isinstance(inner.get("type"), str) else inner
            if "enum" in inner:
                inner["enum"] = [*inner["enum"], None]
        properties[field.name] = inner
    return {
        "type": "object",
        "required": [field.name for field in fields if field.required],
        "properties": properties,
    }


def text(name: str, *, required: bool = False, about: str = "") -> Field:
    """A string."""
    return Field(name, _text, {"type": "string"}, required, None, about)


def flag(name: str, default: bool | None = None, about: str = "") -> Field:
    """True or false."""
    return Field(name, _flag, {"type": "boolean"}, False, default, about)


def whole(name: str, least: int, most: int | None = None, about: str = "") -> Field:
    """A whole number within bounds."""
    schema: dict[str, Any] = {"type": "integer", "minimum": least}
    if most is not None:
        schema["maximum"] = most
    words = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"

    def check(value: Any) -> int:
        # 5.0 is an integer to JSON Schema, and to clients in languages with one kind of number.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or value < least or (most is not None and value > most):
            raise ValueError(f"{words} is needed, not {shown(value)}")
        return value

    return Field(name, check, schema, False, None, about)


def number(name: str, above: float | None = None, about: str = "") -> Field:
    """A number, greater than ``above``."""
    schema: dict[str, Any] = {"type": "number"}
    if above is not None:
        schema["exclusiveMinimum"] = above
    words = "a number is needed" if above is None else f"a number greater than {above:g} is needed"

    def check(value: Any) -> float:
        try:
            wrong = type(value) not in (int, float) or not math.isfinite(float(value))
        except OverflowError:
            wrong = True
        if wrong or (above is not None and value <= above):
            raise ValueError(f"{words}, not {shown(value)}")
        return float(value)

    return Field(name, check, schema, False, None, about)


def choice(name: str, *values: str, default: str | None = None, about: str = "") -> Field:
    """One of some words."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in values:
            raise ValueError(f"{' or '.join(map(repr, values))} is needed, not {shown(value)}")
        return value

    return Field(name, check, {"type": "string", "enum": list(values)}, False, default, about)


def strings(name: str, *, required: bool = False, about: str = "") -> Field:
    """A list of strings."""
    return Field(name, _strings, {"type": "array", "items": {"type": "string"}}, required, None, about)


def documents(name: str = "documents", *, required: bool = True, about: str = "") -> Field:
    """A list of strings, or of objects with a text."""
    # Which of an object's fields make its text is for `document_texts`, which knows the others of the body.
    record = {"type": "object", "properties": {TEXT_KEY: {"type": "string"}}}
    schema = {"type": "array", "items": {"anyOf": [{"type": "string"}, record]}}
    return Field(name, _documents, schema, required, None, about)


def pairs(name: str = "pairs", about: str = "") -> Field:
    """A list of pairs of strings."""
    pair = {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2}
    return Field(name, _pairs, {"type": "array", "items": pair}, False, None, about)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a string is needed, not {shown(value)}")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"true or false is needed, not {shown(value)}")
    return value


def _list(value: Any, needed: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"a list of {needed} is needed, not {shown(value)}")
    return value


def _strings(value: Any) -> list[str]:
    items = _list(value, "strings")
    for place, item in enumerate(items):
        if not isinstance(item, str):
            raise ValueError(f"a list of strings is needed; number {place} is {shown(item)}")
    return items


def _documents(value: Any) -> list[Any]:
    items = _list(value, "strings")
    for place, item in enumerate(items):
        if not isinstance(item, (str, dict)):
            raise ValueError(
                f"a list of strings, or of objects with a text, is needed; number {place} is {shown(item)}"
            )
    return items


def _pairs(value: Any) -> list[tuple[str, str]]:
    items = _list(value, "pairs of strings")
    for place, item in enumerate(items):
        if not (isinstance(item, list) and len(item) == 2 and all(isinstance(part, str) for part in item)):
            raise ValueError(f"a list of pairs of strings is needed; number {place} is {shown(item)}")
    return [(query, document) for query, document in items]
