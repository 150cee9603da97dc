"""TTFT, TPOT and throughput against load, as a picture. Needs matplotlib: the extra `bench`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiollm.bench.workloads import LoadError


def check() -> None:
    """Raises LoadError where matplotlib is missing: before a run, not behind it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise LoadError("--plot needs matplotlib, which is not installed: pip install 'aiollm[bench]'") from error


def draw(path: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Three curves over the runs' load: requests per second where that was set, else requests at once."""
    from matplotlib.figure import Figure

    by_rate = all(run["request_rate"] != "inf" for run in runs)
    loads = [float(run["request_rate"]) if by_rate else run["max_concurrent_requests"] for run in runs]
    order = sorted(range(len(runs)), key=loads.__getitem__)
    x = [loads[at] for at in order]
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, name, title in ((axes[0], "ttft", "Time to first token, ms"), (axes[1], "tpot", "Time per token, ms")):
        highest = f"p{max(runs[0]['percentiles']):g}"
        for label in ("median", highest):
            axis.plot(x, [runs[at][f"{label}_{name}_ms"] for at in order], marker="o", label=label)
        axis.set_title(title)
        axis.legend()
    axes[2].plot(x, [runs[at]["output_throughput"] for at in order], marker="o")
    axes[2].set_title("Output tokens per second")
    for axis in axes:
        axis.set_xlabel("requests per second" if by_rate else "requests at once")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.suptitle(str(runs[0]["model_id"]))
    figure.savefig(path, dpi=110)
