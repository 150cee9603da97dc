"""What native requests do to the logits: a real server against transformers and plain torch, all at once in a batch."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import Server
from tiny_model import in_fp32, write_tiny_model
from tiny_tokenizer import IM_END, VOCAB_SIZE, write_byte_tokenizer
from tokenizers import Tokenizer

FLAGS = ("--data_type", "fp32", "--threads", "1", "--max_total_token_num", "4000", "--running_max_req_size", "16")
PROMPT = [72, 105, 32, 72, 105, 105, 33]
STEPS = 20
WORDS = ["lo", "low", "lowe", "lower"]
Rule = Callable[[torch.Tensor, list[int]], torch.Tensor]
"""Logits [vocabulary] and generated ids -> what the next one is taken from."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    write_tiny_model(made, vocab_size=VOCAB_SIZE + len(WORDS), seed=2)
    return with_words(write_byte_tokenizer(made))


def with_words(folder: Path) -> Path:
    """Give the byte tokenizer of a folder tokens of several bytes."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    # Added tokens that the vocabulary lacks are numbered anew, behind it.
    tokenizer["model"]["vocab"] |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokenizer["model"]["vocab"] |= {word: VOCAB_SIZE + at for at, word in enumerate(WORDS)}
    tokenizer["model"]["merges"] = [[word[:-1], word[-1]] for word in WORDS]
    path.write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server("--model_dir", str(folder), *FLAGS) as running:
        yield running


def continued(model: Any, rule: Rule, prompt: list[int] = PROMPT, steps: int = STEPS) -> list[int]:
    """The greedy continuation of a prompt under a rule, up to the end of sequence."""
    ids = list(prompt)
    with torch.inference_mode():
        while len(ids) < len(prompt) + steps and IM_END not in ids:
            logits = model(torch.tensor([ids])).logits[0, -1]
            ids.append(int(rule(logits, ids[len(prompt) :]).argmax()))
    return ids[len(prompt) :]


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


def only(ids: list[int], tokens: int) -> Rule:
    """Nothing but these ids is drawn, among so many first tokens."""

    def rule(logits: torch.Tensor, output: list[int]) -> torch.Tensor:
        if len(output) >= tokens:
            return logits
        mask = torch.full_like(logits, float("-inf"))
        mask[ids] = 0.0
        return logits + mask

    return rule


CASES: dict[str, tuple[dict[str, Any], Rule]] = {
    "plain": ({}, lambda logits, output: logits),
    "repetition": ({"repetition_penalty": 2.5}, penalties(2.5, 0, 0, False)),
    "repetition of the prompt too": (
        {"repetition_penalty": 2.5, "input_penalty": True},
        penalties(2.5, 0, 0, True),
    ),
    "counts": ({"frequency_penalty": 0.3, "presence_penalty": 0.4}, penalties(1, 0.3, 0.4, False)),
    "counts of the prompt too": (
        {"frequency_penalty": 0.3, "presence_penalty": 0.4, "input_penalty": True},
        penalties(1, 0.3, 0.4, True),
    ),
    "decay": ({"exponential_decay_length_penalty": [4, 1.4]}, decay(4, 1.4)),
    "first token": ({"first_allowed_tokens": [1, 5, 9, 200]}, only([1, 5, 9, 200], 1)),
    "allowed": ({"allowed_token_ids": [*range(40, 50), IM_END]}, only([*range(40, 50), IM_END], STEPS)),
    "slow decay": ({"exponential_decay_length_penalty": [0, 1.1]}, decay(0, 1.1)),
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


def piece(id: int) -> bytes:
    return bytes([id]) if id < 256 else WORDS[id - VOCAB_SIZE].encode() if id >= VOCAB_SIZE else b""


def healed(text: bytes) -> Rule:
    """Tokens whose texts together begin with `text`; each byte is a token, so nothing leads astray."""

    def rule(logits: torch.Tensor, output: list[int]) -> torch.Tensor:
        rest = text[len(b"".join(map(piece, output))) :]
        pieces = map(piece, range(len(logits)))
        allowed = [not rest or (p != b"" and (p.startswith(rest) or rest.startswith(p))) for p in pieces]
        return logits.where(torch.tensor(allowed), float("-inf"))

    return rule


@pytest.mark.parametrize("text", ["hello", "yell", "a low", "slowe", "Hi", "lowlo"])
def test_a_healed_prompt_goes_on_as_plain_torch_has_it(folder: Path, server: Server, text: str) -> None:
    """Among them prompts whose last tokens are words, and could become longer ones."""
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    parameters = {"token_healing": True, "max_new_tokens": 6, "return_details": True, "ignore_eos": True}
    cut = min(2, len(ids) - 1)
    again = b"".join(map(piece, ids[len(ids) - cut :]))
    found = server.post("/generate", {"inputs": text, "parameters": parameters})
    expected = continued(in_fp32(folder), healed(again), ids[: len(ids) - cut], 6 + cut)
    assert [token["id"] for token in found["tokens"]] == expected
    made = b"".join(map(piece, expected))
    assert made.startswith(again)
    assert found["generated_text"] == [made[len(again) :].decode("utf-8", "replace")]
