"""Writes the README's table of models from `workers/families`: python tools/models.py. A test says when it is stale."""

import re
from pathlib import Path

from aiollm.workers.families.table import markdown, rows

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- models: written by tools/models.py -->\n", "<!-- end of models -->\n"


def written(text: str) -> str:
    """The README with the table of now."""
    table = f"{BEGIN}\n{markdown(rows())}\n\n{END}"
    return re.sub(f"(?s){re.escape(BEGIN)}.*{re.escape(END)}", lambda _: table, text)


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
