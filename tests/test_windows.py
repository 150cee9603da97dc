"""Models that mix layers with and without a sliding window, through a real server whose pool is soon full: prompts that
begin alike, conversations that go on, chunks, pauses and lost windows change nothing of what they say."""

import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from serving import Server
from tiny_model import write_tiny_model
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


@pytest.mark.parametrize("family", MIXED)
def test_a_small_pool_says_what_transformers_say(family: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, family, vocab_size=VOCAB_SIZE, **MIXED[family])
    write_byte_tokenizer(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    rng = random.Random(family)
    system = [rng.randrange(256) for _ in range(30)]
    with Server("--model_dir", str(tmp_path), *FLAGS) as server:

        def complete(prompt: list[int]) -> tuple[list[int], int]:
            body = {"prompt": prompt, "max_tokens": OUTPUT, "ignore_eos": True, "return_token_ids": True}
            answer: dict[str, Any] = server.post("/v1/completions", body | {"temperature": 0})
            return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

        prompts = [[*system[: rng.choice([9, 20, 30])], *rng.randbytes(rng.randrange(1, 30))] for _ in range(8)]
        cached = 0
        for turn in range(3):
            with ThreadPoolExecutor(6) as pool:
                answers = list(pool.map(complete, prompts))
            for prompt, (tokens, _) in zip(prompts, answers, strict=True):
                assert tokens == likeliest(model, prompt, tokens)
            cached += sum(found for _, found in answers)
            chosen = rng.sample(range(8), 4) if turn else range(8)
            going_on = [[*prompts[at], *answers[at][0], *rng.randbytes(3)] for at in chosen]
            prompts = [prompt for prompt in going_on if len(prompt) < 70] + prompts[:3]
            prompts = (prompts * 8)[:8]
        metrics = server.get("/metrics")[1]
        log = server.log()
    paused = float(re.search(r"^aiollm_num_preemptions_total (\S+)", metrics, re.MULTILINE)[1])  # type: ignore[index]
    assert cached > 0 and paused > 0
    assert "layers with a window keep the last 11 of each" in log


def likeliest(model: Any, prompt: list[int], output: list[int]) -> list[int]:
    """The token that is likeliest behind the prompt, and behind each of the output."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + output])).logits[0]
    found: list[int] = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    return found
