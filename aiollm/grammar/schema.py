"""JSON schemas, said so that llguidance takes nothing that does not validate.

Of version 1.9.1 three things are known that it takes and should not. Two can be said otherwise, one is refused.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

LITERAL = {"const", "default", "enum", "examples"}  # their values are no schemas
NAMED = {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}  # a schema for each name
NEAREST = 1e-9  # to a bound that is excluded


class SchemaError(ValueError):
    """A schema that cannot be followed; says why."""


def followed(schema: Any) -> Any:
    """The same schema for llguidance. Raises SchemaError, and RecursionError where it nests too deeply."""
    if isinstance(schema, list):
        return [followed(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {name: value if name in LITERAL else _inner(name, value) for name, value in schema.items()}
    return _names(_bounds(found))


def _inner(name: str, value: Any) -> Any:
    if name in NAMED and isinstance(value, Mapping):
        return {each: followed(inner) for each, inner in value.items()}
    return followed(value)


def _bounds(schema: dict[str, Any]) -> dict[str, Any]:
    """An excluded whole number is taken where the other bound lies less than 1 beyond it, away from zero: the bound
    becomes the next number that is allowed."""
    low, high = _bound(schema, "minimum", max), _bound(schema, "maximum", min)
    if low is None or high is None:
        return schema
    (least, above), (most, below) = low, high
    if above and least >= 0 and least == math.floor(least) and least < most < least + 1:
        return {**_without(schema, "inimum"), "minimum": max(least + NEAREST, math.nextafter(least, math.inf))}
    if below and most <= 0 and most == math.floor(most) and most - 1 < least < most:
        return {**_without(schema, "aximum"), "maximum": min(most - NEAREST, math.nextafter(most, -math.inf))}
    return schema


def _bound(schema: Mapping[str, Any], name: str, tighter: Callable[..., float]) -> tuple[float, bool] | None:
    """A bound, and whether it is excluded itself: as a number of its own, or as draft 4 says it."""
    flag = schema.get("exclusive" + name.capitalize())
    bound, excluded = _number(schema.get(name)), _number(flag)
    if excluded is None:
        return None if bound is None else (bound, flag is True)
    tightest = excluded if bound is None else tighter(bound, excluded)
    return tightest, tightest == excluded


def _without(schema: Mapping[str, Any], ending: str) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if not name.endswith(ending)}


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _names(schema: dict[str, Any]) -> dict[str, Any]:
    """Names that the schema does not list are taken however they are escaped, those that it lists among them, and as
    often as they come. Names that follow a pattern have one spelling only."""
    patterns, others = schema.get("patternProperties"), schema.get("additionalProperties", True)
    least, required = _number(schema.get("minProperties")), schema.get("required")
    known = len(set(map(str, required))) if isinstance(required, list) else 0
    if least is not None and least > known + 1 and (patterns or others is not False):
        text = f"minProperties: {least:g} where required has {known} cannot be followed, unless all names are listed"
        raise SchemaError(text)
    if (schema.get("properties") or known) and others is True and not patterns:
        return {**schema, "patternProperties": {"": True}, "additionalProperties": False}
    return schema
