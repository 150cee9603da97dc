"""What the values of options may be. Each function reads a text, or raises what argparse tells the user."""

import argparse
import json
import math
from typing import Any

from aiollm.bench.report import METRICS


def integer(low: int, high: int | None = None) -> Any:
    return _bounded(int, "an integer", low, high)


def number(low: float, high: float | None = None) -> Any:
    return _bounded(float, "a number", low, high)


def _bounded(kind: Any, what: str, low: float, high: float | None) -> Any:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= (math.inf if high is None else high):
            limits = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} must be {what} {limits}")
        return value

    return read


def range_ratio(text: str) -> tuple[float, float]:
    """Of prompts and of outputs: one share for both, or a JSON object of two."""
    shares = json_fields(text) if text.lstrip().startswith("{") else {"input": text, "output": text}
    if wrong := shares.keys() - {"input", "output"}:
        raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: only input and output have a share")
    prompt, output = (number(0, 1)(str(shares.get(name, 0))) for name in ("input", "output"))
    return prompt, output


def own_or_integer(text: str) -> int | None:
    """None for -1."""
    return None if text == "-1" else int(integer(1)(text))


def json_fields(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text} must be a JSON object like {{"min_p": 0.1}}')
    return found


def pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text} must be KEY=VALUE")
    return key, value


def limit_of_metric(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    if name not in METRICS or name == "itl":
        raise argparse.ArgumentTypeError(f"{text} must be METRIC:MS with one of {', '.join(METRICS.keys() - {'itl'})}")
    return name, float(number(0)(limit))


def id_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not (low.isdigit() and high.isdigit() and int(low) < int(high)):
        raise argparse.ArgumentTypeError(f"{text} must be LOW:HIGH, two ids, as in 300:40000")
    return int(low), int(high)


def metrics(text: str) -> list[str]:
    names = text.split(",")
    if wrong := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: only {', '.join(METRICS)} are known")
    return names


def percentiles(text: str) -> list[float]:
    return [float(number(0, 100)(part)) for part in text.split(",")]
