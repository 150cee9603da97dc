"""Settings as a YAML file: a mapping from names to values, in which nothing is executed and no name stands twice."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

Lines = Mapping[tuple[str, ...], int]
"""Where names stand: (name,), and (name, name within it); from 1 on."""


def load(path: str) -> dict[str, Any]:
    """The mapping in a file; an empty file is an empty one. Raises OSError, and ValueError where it is no mapping."""
    return located(path)[0]


def located(path: str) -> tuple[dict[str, Any], Lines]:
    """As `load`, with the lines. Names are what is written there, even where YAML has another reading of it (yes)."""
    loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            if node is not None and loader.construct_document(node) is not None:
                raise ValueError("it must be a mapping of settings, like `port: 9000`")
            return {}, {}
        lines = _lines((), node)
        for name, value in node.value:
            if isinstance(value, yaml.MappingNode):
                lines |= _lines((str(name.value),), value)
        loader.construct_document(node)  # whatever is no YAML of ours raises
        return {name.value: loader.construct_document(value) for name, value in node.value}, lines
    except yaml.MarkedYAMLError as error:  # as text it would show the line, in which a secret may stand
        raise ValueError(f"line {error.problem_mark.line + 1}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    finally:
        loader.dispose()


def _lines(above: tuple[str, ...], node: yaml.MappingNode) -> dict[tuple[str, ...], int]:
    """The lines of a mapping's names. Raises ValueError where one stands there twice, of which YAML takes the last."""
    found: dict[tuple[str, ...], int] = {}
    for name, _ in node.value:
        path, line = (*above, str(name.value)), int(name.start_mark.line) + 1
        if path in found:
            raise ValueError(f"line {line}: {name.value} stands there twice, first in line {found[path]}")
        found[path] = line
    return found


def dump(values: Mapping[str, Any]) -> str:
    """A text that `load` reads back."""
    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, default_flow_style=None)
    return text
