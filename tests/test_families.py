"""Every family through a real server: its greedy tokens are those of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from serving import Server
from tiny_model import FAMILIES, equivalent, in_fp32, write_tiny_model
from tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer
from translations import TRANSLATIONS, alibi

FLAGS = ("--data_type", "fp32", "--threads", "1", "--max_total_token_num", "500", "--chunked_prefill_size", "16")
OVERRIDES = {
    "baichuan": {"num_key_value_heads": 6},
    "baichuan_alibi": {"num_key_value_heads": 6},
    "internlm": {"attention_bias": True},
    "mistral": {"sliding_window": 13},
    "qwen": {"num_key_value_heads": 6},
}
PROMPT = list(b"The owl and the pussy-cat went to sea")


@pytest.mark.parametrize("family", sorted({*FAMILIES, *TRANSLATIONS}))
def test_greedy_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, family, vocab_size=VOCAB_SIZE, **OVERRIDES.get(family, {}))
    write_byte_tokenizer(tmp_path)
    model = in_fp32(equivalent(tmp_path))
    expected = continued(model, PROMPT, 24, family)
    body = {"prompt": PROMPT, "max_tokens": 24, "ignore_eos": True, "return_token_ids": True, "temperature": 0}
    with Server("--model_dir", str(tmp_path), *FLAGS) as server:
        found = server.post("/v1/completions", body)["choices"][0]["token_ids"]
        log = server.log()
    assert found == expected
    assert "nobody read" not in log


@pytest.mark.parametrize(("length", "prompt"), [("24", PROMPT[:12]), ("60", PROMPT)], ids=["short", "long"])
def test_longrope_takes_its_factors_by_the_length_that_is_served(
    length: str, prompt: list[int], tmp_path: Path
) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.3, 2.5, 7.0, 9.0], "original_max_position_embeddings": 24,
    }  # fmt: skip
    options = {"rope_parameters": rope, "original_max_position_embeddings": 24, "sliding_window": None}
    write_tiny_model(tmp_path, "phi3", vocab_size=VOCAB_SIZE, **options)
    write_byte_tokenizer(tmp_path)
    model = in_fp32(tmp_path)
    body = {"prompt": prompt, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True, "temperature": 0}
    with Server("--model_dir", str(tmp_path), *FLAGS, "--max_req_total_len", length) as server:
        found = server.post("/v1/completions", body)["choices"][0]["token_ids"]
    assert found == continued(model, prompt, 12)


def continued(model: Any, prompt: list[int], count: int, family: str = "") -> list[int]:
    """The greedy tokens behind a prompt, by transformers without a cache."""
    expected = list(prompt)
    for _ in range(count):
        arguments = alibi(len(expected)) if family == "baichuan_alibi" else {}
        with torch.no_grad():
            logits = model(torch.tensor([expected]), use_cache=False, **arguments).logits[0, -1]
        expected.append(int(logits.argmax()))
    return expected[len(prompt) :]
