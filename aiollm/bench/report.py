"""Figures of a run: vLLM's names and vLLM's table, so that scripts that read either read ours.

TTFT is from sending to the first event with tokens; TPOT is (last - first) / (tokens - 1) of each request; ITL is
between two events, which may bring several tokens; E2EL is from sending to the last event. `gap` is the longest ITL of
each request, which vLLM does not tell.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from aiollm.bench.client import Outcome

METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
    "gap": ("gap", "Longest Gap of a Request"),
}
WIDTH = 50


def samples(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Milliseconds of each metric, over the requests that succeeded."""
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    for outcome in outcomes:
        if outcome.error:
            continue
        times = outcome.times
        gaps = [1e3 * (after - before) for before, after in pairwise(times)]
        found["ttft"].append(1e3 * (times[0] - outcome.sent))
        found["e2el"].append(1e3 * (times[-1] - outcome.sent))
        found["itl"] += gaps
        if outcome.output > 1:
            found["tpot"].append(1e3 * (times[-1] - times[0]) / (outcome.output - 1))
            found["gap"].append(max(gaps, default=0.0))
    return found


def figures(
    outcomes: Sequence[Outcome], began: float, percentiles: Sequence[float], goodput: dict[str, float]
) -> dict[str, Any]:
    """What `--save-result` keeps of a run that began at second `began`; `goodput` are limits in ms, by metric."""
    good = [outcome for outcome in outcomes if not outcome.error]
    duration = max((outcome.ended for outcome in outcomes), default=began) - began
    prompt, output = sum(outcome.prompt for outcome in good), sum(outcome.output for outcome in good)
    events = sum(len(outcome.times) for outcome in good)
    found: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "total_cached_tokens": sum(outcome.cached for outcome in good),
        "request_throughput": len(good) / duration,
        "request_goodput": None,
        "output_throughput": output / duration,
        "input_throughput": prompt / duration,
        "total_token_throughput": (prompt + output) / duration,
        "max_output_tokens_per_s": _peak_tokens(good, began),
        "max_concurrent_requests": _peak_requests(outcomes),
        "tokens_per_event": output / events if events else 0.0,
    }
    if goodput:
        within = [all(_of(outcome, name) <= limit for name, limit in goodput.items()) for outcome in good]
        found["request_goodput"] = sum(within) / duration
    for name, values in samples(outcomes).items():
        found[f"mean_{name}_ms"] = float(np.mean(values)) if values else 0.0
        found[f"median_{name}_ms"] = float(np.median(values)) if values else 0.0
        found[f"std_{name}_ms"] = float(np.std(values)) if values else 0.0
        for percent in percentiles:
            found[f"p{percent:g}_{name}_ms"] = float(np.percentile(values, percent)) if values else 0.0
    return found


def table(found: dict[str, Any], shown: Sequence[str], percentiles: Sequence[float]) -> str:
    """vLLM's result table, and lines of our own that it does not have."""
    lines = [_title(" Serving Benchmark Result ", "=")]

    def line(text: str, value: Any) -> None:
        lines.append(f"{text:<40} {f'{value:.2f}' if isinstance(value, float) else value:<10}".rstrip())

    line("Successful requests:", found["completed"])
    line("Failed requests:", found["failed"])
    if found["max_concurrency"] is not None:
        line("Maximum request concurrency:", found["max_concurrency"])
    if found["request_rate"] != "inf":
        line("Request rate configured (RPS):", float(found["request_rate"]))
    line("Benchmark duration (s):", found["duration"])
    line("Total input tokens:", found["total_input_tokens"])
    line("Total cached input tokens:", found["total_cached_tokens"])
    line("Total generated tokens:", found["total_output_tokens"])
    line("Request throughput (req/s):", found["request_throughput"])
    if found["request_goodput"] is not None:
        line("Request goodput (req/s):", found["request_goodput"])
    line("Output token throughput (tok/s):", found["output_throughput"])
    line("Peak output token throughput (tok/s):", found["max_output_tokens_per_s"])
    line("Peak concurrent requests:", float(found["max_concurrent_requests"]))
    line("Total token throughput (tok/s):", found["total_token_throughput"])
    line("Input token throughput (tok/s):", found["input_throughput"])
    line("Tokens per event:", found["tokens_per_event"])
    line("Busiest client process (% of a core):", 100 * found["client_cpu_share"])
    for name in shown:
        label, title = METRICS[name]
        lines.append(_title(title, "-"))
        line(f"Mean {label} (ms):", found[f"mean_{name}_ms"])
        line(f"Median {label} (ms):", found[f"median_{name}_ms"])
        for percent in percentiles:
            line(f"P{percent:g} {label} (ms):", found[f"p{percent:g}_{name}_ms"])
    return "\n".join([*lines, "=" * WIDTH])


def detailed(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Every request, for `--save-detailed`; lists run in parallel. Times are seconds."""
    return {
        "input_lens": [outcome.prompt for outcome in outcomes],
        "output_lens": [outcome.output for outcome in outcomes],
        "cached_lens": [outcome.cached for outcome in outcomes],
        "start_times": [outcome.sent for outcome in outcomes],
        "ttfts": [outcome.times[0] - outcome.sent if outcome.times else 0.0 for outcome in outcomes],
        "itls": [np.diff(outcome.times).round(6).tolist() for outcome in outcomes],
        "errors": [outcome.error for outcome in outcomes],
    }


def _of(outcome: Outcome, metric: str) -> float:
    """One request's milliseconds, for goodput; a request of one token has no TPOT."""
    return max(samples([outcome])[metric], default=0.0)


def _peak_tokens(good: Sequence[Outcome], began: float) -> float:
    """Tokens of the busiest second. An event's share is its request's tokens per event."""
    times = np.concatenate([np.array(outcome.times) - began for outcome in good]) if good else np.empty(0)
    shares = [np.full(len(outcome.times), outcome.output / len(outcome.times)) for outcome in good]
    return float(np.bincount(times.astype(int), np.concatenate(shares)).max()) if len(times) else 0.0


def _peak_requests(outcomes: Sequence[Outcome]) -> int:
    """Requests that were under way at once."""
    ends = sorted([(outcome.sent, 1) for outcome in outcomes] + [(outcome.ended, -1) for outcome in outcomes])
    return int(np.cumsum([change for _, change in ends]).max()) if ends else 0


def _title(text: str, fill: str) -> str:
    return f"{text:{fill}^{WIDTH}}"
