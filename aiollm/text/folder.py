"""What the text parts share: their one error, and the small JSON files of a model folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec


class TextError(ValueError):
    """Text, a message list or a model's text files cannot be used as given; the message is fit for the user."""


def read_json(folder: str, name: str) -> dict[str, Any]:
    """The JSON object in file `name` of `folder`, or {} if there is no such file.

    Raises TextError if the file is not a JSON object.
    """
    path = Path(folder, name)
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise TextError(f"{path} is not a JSON object: {error}") from error


def special_tokens(*configs: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the named special tokens ("bos_token": "<s>", ...); an earlier config wins over a later one.

    A token is written as a string or as {"content": string, ...}; flags such as "add_bos_token" are not tokens.
    """
    tokens: dict[str, str] = {}
    for config in configs:
        for name, value in config.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                tokens.setdefault(name, text)
    return tokens
