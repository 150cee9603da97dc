"""Settings as a YAML file: a mapping from names to values, in which nothing is executed and no name stands twice."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]


def load(path: str) -> dict[str, Any]:
    """The mapping in a file; an empty file is an empty one. Raises OSError, and ValueError where it is no mapping."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:  # as text it would show the line, in which a secret may stand
        raise ValueError(f"line {error.problem_mark.line + 1}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError("it must be a mapping of settings, like `port: 9000`")
    name, count = Counter(key.value for key, _ in node.value).most_common(1)[0] if values else ("", 0)
    if count > 1:  # YAML forbids it, the library takes the last one
        raise ValueError(f"{name} stands there {count} times")
    return {str(name): value for name, value in values.items()}


def dump(values: Mapping[str, Any]) -> str:
    """A text that `load` reads back."""
    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, default_flow_style=None)
    return text
