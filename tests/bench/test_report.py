"""The figures of requests whose times are known."""

from typing import Any

import pytest

from aiollm.bench.client import Outcome
from aiollm.bench.report import detailed, figures, table

BEGAN = 100.0
# Sent at 0 and 1 s, the first token after 100 and 200 ms, then one every 50 ms; the last event brings two tokens.
GOOD = [
    Outcome(100.0, prompt=10, output=5, cached=4, times=[100.1, 100.15, 100.2, 100.25], ended=100.25),
    Outcome(101.0, prompt=20, output=1, times=[101.2], ended=101.2),
]
BAD = Outcome(100.5, ended=100.6, error="status 503: full")


def found(outcomes: list[Outcome], **goodput: float) -> dict[str, Any]:
    facts = {"max_concurrency": 2, "request_rate": 4.0, "client_cpu_share": 0.25}
    return facts | figures(outcomes, BEGAN, [50, 99], goodput)


def test_every_figure_follows_from_the_times() -> None:
    run = found([*GOOD, BAD])
    assert (run["completed"], run["failed"]) == (2, 1)
    assert run["duration"] == pytest.approx(1.2)
    assert (run["total_input_tokens"], run["total_output_tokens"], run["total_cached_tokens"]) == (30, 6, 4)
    assert run["output_throughput"] == pytest.approx(5)
    assert run["total_token_throughput"] == pytest.approx(30)
    assert run["request_throughput"] == pytest.approx(2 / 1.2)
    assert run["tokens_per_event"] == pytest.approx(6 / 5)
    assert run["mean_ttft_ms"] == pytest.approx(150)
    assert run["median_tpot_ms"] == pytest.approx(150 / 4), "a request of one token has none"
    assert run["median_itl_ms"] == pytest.approx(50)
    assert run["median_gap_ms"] == pytest.approx(50)
    assert run["p99_e2el_ms"] == pytest.approx(250, rel=0.01)
    assert run["max_output_tokens_per_s"] == pytest.approx(5)
    assert run["max_concurrent_requests"] == 1


def test_goodput_counts_requests_that_keep_every_limit() -> None:
    assert found(GOOD)["request_goodput"] is None
    assert found(GOOD, ttft=150.0)["request_goodput"] == pytest.approx(1 / 1.2)
    assert found(GOOD, ttft=250.0, tpot=40.0)["request_goodput"] == pytest.approx(2 / 1.2)
    assert found(GOOD, ttft=250.0, tpot=30.0)["request_goodput"] == pytest.approx(1 / 1.2)


def test_overlapping_requests_are_counted_at_once() -> None:
    overlapping = [Outcome(100.0, ended=103.0, error="x"), Outcome(101.0, ended=102.0, error="x")]
    assert figures(overlapping, BEGAN, [99], {})["max_concurrent_requests"] == 2


def test_the_table_is_vllms() -> None:
    lines = table(found(GOOD, ttft=250.0), ["ttft", "tpot", "itl", "e2el"], [99]).splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============" and lines[-1] == "=" * 50
    for line in (
        "Successful requests:                     2",
        "Failed requests:                         0",
        "Maximum request concurrency:             2",
        "Request rate configured (RPS):           4.00",
        "Benchmark duration (s):                  1.20",
        "Total input tokens:                      30",
        "Total generated tokens:                  6",
        "Request throughput (req/s):              1.67",
        "Request goodput (req/s):                 1.67",
        "Output token throughput (tok/s):         5.00",
        "Peak output token throughput (tok/s):    5.00",
        "Peak concurrent requests:                1.00",
        "Total token throughput (tok/s):          30.00",
        "---------------Time to First Token----------------",
        "Mean TTFT (ms):                          150.00",
        "Median TTFT (ms):                        150.00",
        "-----Time per Output Token (excl. 1st token)------",
        "Mean TPOT (ms):                          37.50",
        "---------------Inter-token Latency----------------",
        "----------------End-to-end Latency----------------",
    ):
        assert line in lines
    assert any(line.startswith("P99 TTFT (ms):") for line in lines)


def test_a_run_without_a_success_is_a_table_too() -> None:
    run = found([BAD])
    assert run["output_throughput"] == run["mean_ttft_ms"] == run["max_output_tokens_per_s"] == 0
    assert "Failed requests:                         1" in table(run, ["ttft"], [99])


def test_details_tell_every_request() -> None:
    found = detailed([*GOOD, BAD])
    assert found["input_lens"] == [10, 20, 0] and found["errors"] == ["", "", "status 503: full"]
    assert found["ttfts"] == pytest.approx([0.1, 0.2, 0.0])
    assert found["itls"] == [[0.05, 0.05, 0.05], [], []]
