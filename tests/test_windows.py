"""Models that mix layers with and without a sliding window, through a real server whose pool is soon full: prompts that
begin alike, conversations that go on, chunks, pauses and lost windows change nothing of what they say."""

import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from likeliest import assert_likeliest
from serving import Server
from tiny_model import in_fp32, write_tiny_model
from tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer

# Prompts are computed 16 tokens at a time; all layers of 70 tokens fit.
FLAGS = (
    "--data_type", "fp32", "--threads", "1", "--max_total_token_num", "70", "--chunked_prefill_size", "16",
    "--running_max_req_size", "6", "--max_queue_tokens", "5000", "--schedule_policy", "aggressive",
)  # fmt: skip
MIXED = {
    "cohere2": {"num_hidden_layers": 4, "sliding_window_pattern": 4, "layer_types": None},
    "gemma2": {},
    "gemma3": {"num_hidden_layers": 7, "sliding_window_pattern": 6},
    "ministral": {},
    "olmo3": {},
}
OUTPUT = 80
GREEDY = {"ignore_eos": True, "return_token_ids": True, "temperature": 0}
on_devices = pytest.mark.parametrize(
    "device",
    [
        pytest.param(("--device", "cpu"), id="cpu"),
        pytest.param(("--device", "cuda"), id="graphs", marks=pytest.mark.gpu),
        pytest.param(("--device", "cuda", "--disable_cudagraph"), id="eager", marks=pytest.mark.gpu),
    ],
)


@on_devices
@pytest.mark.parametrize("family", MIXED)
def test_a_small_pool_says_what_transformers_say(family: str, device: tuple[str, ...], tmp_path: Path) -> None:
    write_tiny_model(tmp_path, family, vocab_size=VOCAB_SIZE, **MIXED[family])
    write_byte_tokenizer(tmp_path)
    model = in_fp32(tmp_path)
    rng = random.Random(family)
    system = [rng.randrange(256) for _ in range(30)]
    with Server("--model_dir", str(tmp_path), *FLAGS, *device) as server:
        prompts = [[*system[: rng.choice([9, 20, 30])], *rng.randbytes(rng.randrange(1, 30))] for _ in range(8)]
        cached = 0
        for turn in range(3):
            with ThreadPoolExecutor(6) as pool:
                answers = list(pool.map(partial(complete, server, OUTPUT), prompts))
            for prompt, (tokens, _) in zip(prompts, answers, strict=True):
                assert_likeliest(model, prompt, tokens)
            cached += sum(found for _, found in answers)
            chosen = rng.sample(range(8), 4) if turn else range(8)
            going_on = [[*prompts[at], *answers[at][0], *rng.randbytes(3)] for at in chosen]
            prompts = [prompt for prompt in going_on if len(prompt) < 70] + prompts[:3]
            prompts = (prompts * 8)[:8]
        paused = server.metric("aiollm_num_preemptions_total")
        log = server.log()
    assert cached > 0 and paused > 0
    assert "layers with a window keep the last 11 of each" in log


@on_devices
def test_windows_that_span_many_tiles_say_what_transformers_say(device: tuple[str, ...], tmp_path: Path) -> None:
    """Contexts are up to nine times the window, which is longer than a tile of the kernels in fp32."""
    window = 75
    sizes = {"max_position_embeddings": 1024, "sliding_window": window, **MIXED["gemma3"]}
    write_tiny_model(tmp_path, "gemma3", vocab_size=VOCAB_SIZE, **sizes)
    write_byte_tokenizer(tmp_path)
    model = in_fp32(tmp_path)
    rng = random.Random(1)
    system = [*rng.randbytes(300)]
    prompts = [[*system[: rng.choice([0, 170, 300])], *rng.randbytes(rng.randrange(1, 230))] for _ in range(12)]
    flags = (
        "--data_type", "fp32", "--threads", "1", "--max_total_token_num", "700", "--batch_max_tokens", "200",
        "--running_max_req_size", "8", "--schedule_policy", "aggressive",
    )  # fmt: skip
    with Server("--model_dir", str(tmp_path), *flags, *device) as server:
        body = {"prompt": prompts, "max_tokens": 160} | GREEDY  # at once: some have to be paused, however fast it is
        choices = server.post("/v1/completions", body)["choices"]
        for prompt, choice in zip(prompts, choices, strict=True):
            assert_likeliest(model, prompt, choice["token_ids"])
        assert server.metric("aiollm_num_preemptions_total") > 0
        with ThreadPoolExecutor(8) as pool:  # again from the cache, as far as windows are still there
            answers = list(pool.map(partial(complete, server, 160), prompts))
        for prompt, (tokens, _) in zip(prompts, answers, strict=True):
            assert_likeliest(model, prompt, tokens)
        assert any(cached > window for _, cached in answers)


def complete(server: Server, count: int, prompt: list[int]) -> tuple[list[int], int]:
    """The greedy tokens behind a prompt, and how many of the prompt's were found in the cache."""
    answer: dict[str, Any] = server.post("/v1/completions", {"prompt": prompt, "max_tokens": count} | GREEDY)
    return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]
