"""Writes the README's table of models: python tools/models.py. A test says when it is stale.

The rows are those of `aiollm models`, the figures those of tools/results/families.json (make families).
"""

import json
import re
from pathlib import Path
from typing import Any

from aiollm.workers.families.table import Row, rows

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "tools/results/families.json"
BEGIN, END = "<!-- models: written by tools/models.py -->\n", "<!-- end of models -->\n"


def markdown(found: list[Row], results: dict[str, Any]) -> str:
    """The table, and below it what its figures are."""
    lines = ["| Models | `architectures` in config.json | Parts | error | loads |", "|---|---|---|---|---|"]
    for row in found:
        names = ", ".join(f"`{name}`" for name in row.architectures)
        measured = results["families"].get(row.module)
        error = f"{measured['error']:.0e}".replace("e-0", "e-") if measured else ""
        loading = measured["loading"] if measured else {"megabytes": 0, "seconds": 1}
        speed = f"{loading['megabytes'] / loading['seconds'] / 1000:.1f} GB/s" if measured else ""
        lines.append(f"| {row.models} | {names} | {row.parts} | {error} | {speed} |")
    about = (
        "Error: the largest difference of logits from transformers', as a share of the largest logit, over prompts "
        "computed whole, in chunks and token by token, in fp32, on tiny random checkpoints of every variant that is "
        "tested. Loads: a checkpoint of some 100 to 170 MB from the page cache, bf16 into bf16, the best of 20 times. "
        f"On {results['cores']} cores of {results['device']}, torch {results['torch']}, transformers "
        f"{results['transformers']}, {results['date']}; `make families` measures it again."
    )
    return "\n".join([*lines, "", about])


def written(text: str) -> str:
    """The README with the table of now."""
    table = f"{BEGIN}\n{markdown(rows(), json.loads(RESULTS.read_text(encoding='utf-8')))}\n\n{END}"
    return re.sub(f"(?s){re.escape(BEGIN)}.*{re.escape(END)}", lambda _: table, text)


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
