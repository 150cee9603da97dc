"""Logprobs in the two shapes of OpenAI's API, a list of tokens for chat and parallel lists for completions, and in
vLLM's for prompts."""

from collections.abc import Sequence
from typing import Any

from aiollm.api.choice import Choice, Entry
from aiollm.engine.request import PromptToken
from aiollm.text.tokenizer import Tokenizer

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say


class TokenNames:
    """How tokens are shown: as text, or as "token_id:17" where the client asked for ids."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def text(self, id: int) -> str:
        return f"token_id:{id}" if self._as_ids else self.decoded(id)

    def decoded(self, id: int) -> str:
        return self._tokenizer.token_text(id)

    def chat(self, id: int, logprob: float | None) -> dict[str, Any]:
        value = None if logprob is None else max(LOWEST, logprob)
        return {"token": self.text(id), "logprob": value, "bytes": list(self._tokenizer.token_bytes(id))}


def chat_logprobs(entries: Sequence[Entry], names: TokenNames) -> dict[str, Any]:
    """`logprobs` of a chat choice."""
    return {
        "content": [
            {**names.chat(entry.id, entry.logprob), "top_logprobs": [names.chat(*pair) for pair in entry.top]}
            for entry in entries
        ]
    }


def completion_logprobs(entries: Sequence[Entry], names: TokenNames) -> dict[str, Any]:
    """`logprobs` of a completion choice. The drawn token is always among top_logprobs, so there may be one more."""
    return {
        "tokens": [names.text(entry.id) for entry in entries],
        "token_logprobs": [None if entry.logprob is None else max(LOWEST, entry.logprob) for entry in entries],
        "top_logprobs": [_top(entry, names) for entry in entries],
        "text_offset": [entry.start for entry in entries],
    }


def prompt_logprobs(choice: Choice, names: TokenNames) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: nothing is known of the first token."""
    ids = choice.request.prompt
    return [None, *(_scored(int(ids[token.position]), token, names) for token in choice.prompt_scores)]


def _scored(id: int, token: PromptToken, names: TokenNames) -> dict[str, Any]:
    ranks = {id: token.rank} | {other: rank for rank, (other, _) in enumerate(token.top, 1)}
    found = dict([(id, token.logprob), *token.top])
    return {
        str(other): {"logprob": max(LOWEST, logprob), "rank": ranks[other], "decoded_token": names.decoded(other)}
        for other, logprob in found.items()
    }


def _top(entry: Entry, names: TokenNames) -> dict[str, float] | None:
    if entry.logprob is None:
        return None
    top: dict[str, float] = {}
    for token_id, logprob in (*entry.top, (entry.id, entry.logprob)):
        top.setdefault(names.text(token_id), max(LOWEST, logprob))  # of several ids with one text the likeliest stays
    return top
