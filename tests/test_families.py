"""Every family through a real server: its greedy tokens are those of transformers."""

from pathlib import Path

import pytest
import torch
import transformers
from serving import Server
from tiny_model import FAMILIES, equivalent, write_tiny_model
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
    model = transformers.AutoModelForCausalLM.from_pretrained(equivalent(tmp_path), dtype=torch.float32)
    expected = list(PROMPT)
    for _ in range(24):
        arguments = alibi(len(expected)) if family == "baichuan_alibi" else {}
        with torch.no_grad():
            logits = model(torch.tensor([expected]), use_cache=False, **arguments).logits[0, -1]
        expected.append(int(logits.argmax()))
    body = {"prompt": PROMPT, "max_tokens": 24, "ignore_eos": True, "return_token_ids": True, "temperature": 0}
    with Server("--model_dir", str(tmp_path), *FLAGS) as server:
        found = server.post("/v1/completions", body)["choices"][0]["token_ids"]
        log = server.log()
    assert found == expected[len(PROMPT) :]
    assert "nobody read" not in log
