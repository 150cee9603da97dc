import asyncio
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from stand import SLOTS, Stand, stand

CHAT = "/v1/chat/completions"


async def scrape(served: Stand) -> dict[str, float]:
    """Samples by name and labels."""
    async with served.session.get(served.url + "/metrics") as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        families = text_string_to_metric_families(await response.text())
    return {
        sample.name + "".join(f"|{value}" for value in sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_figures_follow_the_requests(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder, loading=True) as served:
            before = await scrape(served)
            assert before["aiollm_ready"] == 0 and before["aiollm_kv_cache_usage_perc"] == 0
            served.start()
            served.workers.say("Hello")
            body = {"messages": [{"role": "user", "content": "hi"}], "seed": 0}
            await served.post(CHAT, body)
            await served.post(CHAT, {**body, "max_tokens": 2})
            await served.post(CHAT, {**body, "temperature": 7})
            after = await scrape(served)
            assert after["aiollm_ready"] == 1
            assert after["aiollm_prompt_tokens_total"] == 42
            assert after["aiollm_generation_tokens_total"] == 8
            assert after["aiollm_request_success_total|stop"] == 1
            assert after["aiollm_request_success_total|length"] == 1
            assert after["aiollm_prefix_cache_queries_total"] == 42
            assert after["aiollm_prefix_cache_hits_total"] == 20
            assert after["aiollm_num_preemptions_total"] == 0
            assert after["aiollm_http_responses_total|400"] == 1
            for name in (
                "time_to_first_token_seconds", "request_queue_time_seconds", "e2e_request_latency_seconds",
                "request_prompt_tokens", "request_generation_tokens",
            ):  # fmt: skip
                assert after[f"aiollm_{name}_count"] == 2, name
            assert after["aiollm_inter_token_latency_seconds_count"] == 6
            assert after["aiollm_request_prompt_tokens_sum"] == 42
            assert after["aiollm_iteration_seconds_count"] >= 8
            assert after["aiollm_device_idle_seconds_total"] > 0
            assert after["aiollm_num_requests_running"] == after["aiollm_num_requests_waiting"] == 0
            assert after["aiollm_kv_cache_usage_perc"] == 0
            assert after["aiollm_prefix_cache_usage_perc"] == 26 / SLOTS

    asyncio.run(main())


def test_a_model_that_fails_at_arithmetic_is_counted(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder) as served:
            served.workers.reply = lambda prompt, seed: [97, -1]
            await served.post(CHAT, {"messages": [{"role": "user", "content": "hi"}]})
            after = await scrape(served)
            assert after["aiollm_request_success_total|numerical_error"] == 1

    asyncio.run(main())


def test_gauges_show_what_runs_now_and_a_client_that_left_is_counted(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder) as served:
            served.workers.held = True
            task = asyncio.create_task(served.post("/v1/completions", {"prompt": "x" * 40, "n": 10}))
            core = served.engine.core
            assert core is not None
            await served.until(lambda: len(core.ledger.running) == 8)
            during = await scrape(served)
            assert (during["aiollm_num_requests_running"], during["aiollm_num_requests_waiting"]) == (8, 2)
            assert during["aiollm_kv_cache_usage_perc"] > 0
            task.cancel()
            await served.until(lambda: core.idle)
            served.workers.release()
            after = await scrape(served)
            assert after["aiollm_request_success_total|abort"] == 10
            assert after["aiollm_http_responses_total|499"] == 1

    asyncio.run(main())


def test_inter_token_times_below_ten_milliseconds_are_told_apart(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder) as served:
            figures = await scrape(served)
            edges = [
                name.split("|")[1] for name in figures if name.startswith("aiollm_inter_token_latency_seconds_bucket")
            ]
            assert edges[:4] == ["0.001", "0.0025", "0.005", "0.0075"]

    asyncio.run(main())
