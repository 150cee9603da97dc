"""JSON of a request into a type, and what is said of JSON that does not fit."""

import re
from typing import NoReturn, TypeVar

import msgspec

from aiollm.api.errors import invalid

R = TypeVar("R")
_AT = re.compile(r"(?P<problem>.*) - at (?:`key` in )?`\$\.(?P<path>[^`]*)`", re.DOTALL)
_MISSING = re.compile(r"missing required field `(\w+)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)


def decode(decoder: msgspec.json.Decoder[R], body: bytes) -> R:
    """Raises ApiError, with the field at fault, where the body is not what the decoder expects."""
    try:
        body.decode()  # msgspec does not look into the strings of fields that it skips
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        _refuse(error)
    except RecursionError:
        raise invalid(None, "the JSON of the request body is nested too deeply", "invalid_json") from None
    except ValueError as error:  # msgspec.DecodeError and UnicodeDecodeError among them
        reason = str(error) if body else "it is empty"
        raise invalid(None, f"the request body is not valid JSON: {reason}", "invalid_json") from error


def given(value: msgspec.Raw) -> bool:
    """Whether a field whose value is read later was given, and is not null."""
    return bytes(value) not in (b"", b"null")


def _refuse(error: msgspec.ValidationError) -> NoReturn:
    """The field at fault is the head of the path at the end of msgspec's message; LightLLM's lie in `parameters`."""
    text = str(error)
    if found := _AT.fullmatch(text):
        path, problem = found["path"], found["problem"]
        raise invalid(
            re.split(r"\W", path.removeprefix("parameters."))[0], f"{path}: {problem[0].lower()}{problem[1:]}"
        ) from error
    if missing := _MISSING.search(text):
        raise invalid(missing[1], f"{missing[1]}: this field is required", "missing_field") from error
    if unknown := _UNKNOWN.fullmatch(text):
        raise invalid(unknown[1], f"{unknown[1]}: this field is unknown", "unknown_field") from error
    raise invalid(None, f"the request body must be a JSON object: {text}", "invalid_json") from error
