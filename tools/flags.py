"""Writes the README's table of flags from `aiollm/config.py`: python tools/flags.py. A test says when it is stale."""

import re
from pathlib import Path

from aiollm.arguments import allowed
from aiollm.config import FIELDS, Field

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- flags: written by tools/flags.py -->\n", "<!-- end of flags -->\n"


def row(field: Field) -> str:
    """One flag as a line of the table."""
    names = ", ".join(f"`--{name}`" for name in (f"{field.name} {field.setting.unit}".rstrip(), *field.setting.aliases))
    values = "" if field.plain in (str, bool, tuple[str, ...]) else allowed(field.plain, field.meta)
    default = "" if field.plain is bool or field.default in ("", ()) else f"`{field.default}`"
    return f"| {names} | {field.setting.text} | {values} | {default} |"


def table() -> str:
    """Every flag, in the order and under the headings of --help."""
    lines = []
    for group in dict.fromkeys(field.setting.group for field in FIELDS.values()):
        lines += [f"| **{group}** | | values | default |", "|---|---|---|---|"]
        lines += [row(field) for field in FIELDS.values() if field.setting.group == group]
        lines.append("")
    return "\n".join(lines)


def written(text: str) -> str:
    """The README with the table of now."""
    return re.sub(f"(?s){re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n{table()}\n{END}", text)


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
