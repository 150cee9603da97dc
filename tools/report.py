"""Figures of simulated and real runs: tables, means over seeds, plots, and the files in tools/results."""

import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
LABELS = {
    "steps": "decode steps", "memory": "share of the pool in use, %", "evicted": "pauses by 100 answers",
    "goodput": "goodput, tokens/s", "ttft_p99": "first token, p99, s", "gap_p99": "longest gap, p99, s",
    "broken": "streams that stood still, %",
}  # fmt: skip
Rows = list[dict[str, Any]]


def percentile(values: list[float], share: float) -> float:
    """NaN of nothing."""
    return float(np.percentile(values, share)) if values else float("nan")


def over_seeds(rows: Rows) -> dict[str, Any]:
    """Runs that differ in their seed as one: means, the standard deviation of goodput, and goodput by seed."""
    mean: dict[str, Any] = dict(rows[0])
    for name, value in rows[0].items():
        if isinstance(value, int | float):
            mean[name] = float(np.mean([row[name] for row in rows]))
    goodputs = [row["goodput"] for row in rows]
    mean["goodput_sd"] = float(np.std(goodputs, ddof=1)) if len(rows) > 1 else 0.0
    mean["goodput_by_seed"] = [round(value, 1) for value in goodputs]
    return mean


def beside(rows: Rows) -> None:
    """Put into each row what its goodput is by that of the other policies on the same requests: the mean over seeds,
    and the least."""
    by = {(row["workload"], row["policy"]): np.array(row["goodput_by_seed"]) for row in rows}
    for row in rows:
        for name, other in (
            ("by_conservative", "conservative"),
            ("by_aggressive", "aggressive"),
            ("by_optimum", "optimum"),
        ):
            if (row["workload"], other) in by:
                ratios = by[row["workload"], row["policy"]] / by[row["workload"], other]
                row[name], row[f"{name}_least"] = float(ratios.mean()), float(ratios.min())


def table(rows: Rows, columns: tuple[str, ...]) -> str:
    """Rows as text, a column as wide as it needs."""
    cells = [columns, *(tuple(_cell(row.get(name)) for name in columns) for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(columns))]
    lines = [[f"{text:<{width}}" for text, width in zip(row, widths, strict=True)] for row in cells]
    figures = [[f"{text:>{width}}" for text, width in zip(row, widths, strict=True)] for row in cells]
    return "\n".join("  ".join([*left[:2], *right[2:]]) for left, right in zip(lines, figures, strict=True))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def plot(rows: Rows, names: tuple[str, ...], path: Path) -> None:
    """Bars by workload and policy, a panel for each of `names`. Needs matplotlib (the extra `plots`)."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path.name} is not drawn: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    loads, policies = (
        list(dict.fromkeys(row["workload"] for row in rows)),
        list(dict.fromkeys(row["policy"] for row in rows)),
    )
    figure, panels = pyplot.subplots(1, len(names), figsize=(4.2 * len(names), 3.6), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        for at, policy in enumerate(policies):
            found = {row["workload"]: row for row in rows if row["policy"] == policy}
            values = [found.get(load, {}).get(name, 0) for load in loads]
            spread = [found.get(load, {}).get(f"{name}_sd", 0) for load in loads] if name == "goodput" else None
            places = np.arange(len(loads)) + (at - len(policies) / 2) * 0.8 / len(policies)
            panel.bar(places, values, 0.8 / len(policies), yerr=spread, label=policy, align="edge")
        panel.set_xticks(range(len(loads)), loads, rotation=20, fontsize=8)
        panel.set_title(LABELS[name], fontsize=9)
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def save(name: str, rows: Rows, setup: dict[str, Any], panels: tuple[str, ...], order: Sequence[str]) -> None:
    """Runs as JSON and PNG in tools/results, beside those of other workloads and policies that are there already and
    were made with the same settings. `order` names workloads and policies as they are to stand."""
    path = RESULTS / f"{name}.json"
    made = {
        "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "numpy": np.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }  # fmt: skip
    if path.exists():
        old = json.loads(path.read_bytes())
        if {key: value for key, value in old["about"].items() if key not in made} != setup:
            raise SystemExit(f"{path} was made with other settings: give this one another name")
        new = {(row["workload"], row["policy"]) for row in rows}
        rows = [*rows, *(row for row in old["runs"] if (row["workload"], row["policy"]) not in new)]
    if "goodput_by_seed" in rows[0]:
        beside(rows)
    rows = sorted(rows, key=lambda row: (order.index(row["workload"]), order.index(row["policy"])))
    path.write_text(json.dumps({"about": {**made, **setup}, "runs": rows}, indent=1) + "\n")
    plot(rows, panels, path.with_suffix(".png"))
