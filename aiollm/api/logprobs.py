"""Logprobs in the two shapes of OpenAI's API, a list of tokens for chat and parallel lists for completions, and in
vLLM's for prompts."""

from collections.abc import Callable, Sequence
from typing import Any

from aiollm.api.choice import Choice, Entry
from aiollm.engine.request import PromptToken
from aiollm.text.tokenizer import Tokenizer

Top = Sequence[tuple[int, float]]
LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say


class TokenNames:
    """How tokens are shown: as text, or as "token_id:17" where the client asked for ids."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool) -> None:
        self.bytes: Callable[[int], list[int]] = tokenizer.token_numbers
        self.decoded: Callable[[int], str] = tokenizer.token_text
        self.text: Callable[[int], str] = _id_text if as_ids else self.decoded


def chat_logprobs(entries: Sequence[Entry], names: TokenNames) -> dict[str, Any]:
    """`logprobs` of a chat choice."""
    text, numbers = names.text, names.bytes
    return {
        "content": [
            {
                "token": text(entry.id),
                "logprob": _said(entry.logprob),
                "bytes": numbers(entry.id),
                "top_logprobs": [
                    {"token": text(id), "logprob": logprob, "bytes": numbers(id)} for id, logprob in _sayable(entry.top)
                ],
            }
            for entry in entries
        ]
    }


def completion_logprobs(entries: Sequence[Entry], names: TokenNames) -> dict[str, Any]:
    """`logprobs` of a completion choice. The drawn token is always among top_logprobs, so there may be one more."""
    tokens: list[str] = []
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    starts: list[int] = []
    text = names.text
    for entry in entries:
        token, logprob = text(entry.id), _said(entry.logprob)
        tokens.append(token)
        logprobs.append(logprob)
        tops.append(None if logprob is None else _top(entry.top, token, logprob, text))
        starts.append(entry.start)
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": starts}


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


def _top(top: Top, token: str, logprob: float, text: Callable[[int], str]) -> dict[str, float]:
    """The alternatives and, behind them, the drawn token; of several ids with one text the likeliest stays."""
    found: dict[str, float] = {}
    add = found.setdefault
    for id, value in _sayable(top):
        add(text(id), value)
    add(token, logprob)
    return found


def _said(logprob: float | None) -> float | None:
    return None if logprob is None else max(LOWEST, logprob)


def _sayable(top: Top) -> Top:
    """Without minus infinity, which JSON cannot say; the likeliest come first, so there is hardly ever any."""
    if not top or top[-1][1] > LOWEST:
        return top
    return [(id, max(LOWEST, logprob)) for id, logprob in top]


def _id_text(id: int) -> str:
    return f"token_id:{id}"
