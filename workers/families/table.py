"""What can be served, as a table: python -m aiollm models

Each family's row is the first line of its file, `Models: parts.`, and the names that config.json gives to it.
"""

import argparse
from importlib import import_module
from typing import NamedTuple

from aiollm.workers.families.registry import FAMILIES


class Row(NamedTuple):
    """One family."""

    module: str  # its file
    models: str
    parts: str
    architectures: list[str]


def rows() -> list[Row]:
    """All families, in the order of their files' names."""
    found = []
    for module in sorted(set(FAMILIES.values())):
        models, _, parts = (import_module(module).__doc__ or "").partition("\n")[0].partition(": ")
        names = [name for name, at in FAMILIES.items() if at == module]
        found.append(Row(module.rpartition(".")[2], models, parts.removesuffix("."), names))
    return found


def text(found: list[Row]) -> str:
    """Two lines for each family, for a terminal."""
    return "\n".join(f"{', '.join(row.architectures)}\n    {row.models}: {row.parts}" for row in found)


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(prog="aiollm models", description="List the models that can be served.").parse_args()
    print(text(rows()))


if __name__ == "__main__":
    main()
