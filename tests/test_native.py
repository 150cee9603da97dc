"""What native requests do to the logits: a real server against transformers and plain torch, all at once in a batch."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import Server
from tiny_model import in_fp32, write_tiny_model
from tiny_tokenizer import IM_END, VOCAB_SIZE, write_byte_tokenizer

FLAGS = ("--data_type", "fp32", "--threads", "1", "--max_total_token_num", "4000", "--running_max_req_size", "16")
PROMPT = [72, 105, 32, 72, 105, 105, 33]
STEPS = 20
Rule = Callable[[torch.Tensor, list[int]], torch.Tensor]
"""Logits [vocabulary] and generated ids -> what the next one is taken from."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    write_tiny_model(made, vocab_size=VOCAB_SIZE, seed=1)
    return write_byte_tokenizer(made)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server("--model_dir", str(folder), *FLAGS) as running:
        yield running


def continued(model: Any, rule: Rule, steps: int = STEPS) -> list[int]:
    """The greedy continuation of the prompt under a rule, up to the end of sequence."""
    ids = list(PROMPT)
    with torch.inference_mode():
        while len(ids) < len(PROMPT) + steps and IM_END not in ids:
            logits = model(torch.tensor([ids])).logits[0, -1]
            ids.append(int(rule(logits, ids[len(PROMPT) :]).argmax()))
    return ids[len(PROMPT) :]


def penalties(repetition: float, frequency: float, presence: float, with_prompt: bool) -> Rule:
    def rule(logits: torch.Tensor, output: list[int]) -> torch.Tensor:
        logits = logits.clone()
        counted = PROMPT + output if with_prompt else output
        for id in set(counted):
            x = float(logits[id])
            x = x / repetition if x > 0 else x * repetition
            logits[id] = x - frequency * counted.count(id) - presence
        return logits

    return rule


def decay(start: int, factor: float) -> Rule:
    def rule(logits: torch.Tensor, output: list[int]) -> torch.Tensor:
        logits = logits.clone()
        logits[IM_END] += abs(logits[IM_END]) * (factor ** max(0, len(output) - start) - 1)
        return logits

    return rule


CASES: dict[str, tuple[dict[str, Any], Rule]] = {
    "plain": ({}, lambda logits, output: logits),
    "repetition": ({"repetition_penalty": 1.8}, penalties(1.8, 0, 0, False)),
    "repetition of the prompt too": (
        {"repetition_penalty": 1.8, "input_penalty": True},
        penalties(1.8, 0, 0, True),
    ),
    "counts": ({"frequency_penalty": 0.3, "presence_penalty": 0.4}, penalties(1, 0.3, 0.4, False)),
    "counts of the prompt too": (
        {"frequency_penalty": 0.3, "presence_penalty": 0.4, "input_penalty": True},
        penalties(1, 0.3, 0.4, True),
    ),
    "decay": ({"exponential_decay_length_penalty": [4, 1.4]}, decay(4, 1.4)),
    "slow decay": ({"exponential_decay_length_penalty": [0, 1.05]}, decay(0, 1.05)),
}


def test_penalties_are_those_of_plain_torch_in_one_batch(folder: Path, server: Server) -> None:
    def answer(parameters: dict[str, Any]) -> tuple[list[int], str]:
        more = {"max_new_tokens": STEPS, "return_details": True}
        found = server.post("/generate", {"inputs": PROMPT, "parameters": parameters | more})
        return [token["id"] for token in found["tokens"]], found["finish_reason"]

    model = in_fp32(folder)
    expected = {name: continued(model, rule) for name, (_, rule) in CASES.items()}
    with ThreadPoolExecutor(len(CASES)) as pool:
        answers = dict(zip(CASES, pool.map(answer, [fields for fields, _ in CASES.values()]), strict=True))
    assert {name: ids for name, (ids, _) in answers.items()} == expected
    assert len({tuple(ids) for ids in expected.values()}) == len(CASES), "each rule makes a difference"
    assert [answers[name][1] for name in ("plain", "decay")] == ["length", "stop"]
    assert len(expected["decay"]) > 5
