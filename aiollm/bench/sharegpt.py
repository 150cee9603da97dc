"""ShareGPT's own JSON, a list of {"conversations": [{"value": prompt}, {"value": answer}, ...]}.

It is taken as vLLM's benchmark takes it: the first prompt of a conversation is asked, as text, and the answer is as
long as that of the conversation was. Lengths are in the tokens of the server's tokenizer, which its /tokenize tells.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import aiohttp
import msgspec

from aiollm.bench.workloads import LoadError, Turn

MIN_TOKENS = 4  # of a prompt, and of an answer
MAX_PROMPT = 1024  # tokens
MAX_BOTH = 2048  # tokens of a prompt and its answer
AT_ONCE = 64  # conversations whose tokens are counted at once
Count = Callable[[str], Awaitable[int]]
"""The tokens of a text."""


class _Said(msgspec.Struct):
    value: str


class _Entry(msgspec.Struct):
    conversations: list[_Said] = []


class _Counted(msgspec.Struct):
    count: int


def read(path: Path) -> list[tuple[str, str]] | None:
    """First prompt and answer of each conversation; None where the file holds lengths. Raises LoadError."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=list[tuple[int, int] | _Entry])
    except (OSError, msgspec.DecodeError) as error:
        raise LoadError(
            f"--dataset-path: {path} is neither ShareGPT's JSON, a list of conversations, nor a JSON list of"
            f" [prompt, output] lengths: {error}"
        ) from error
    entries = [entry.conversations for entry in found if isinstance(entry, _Entry)]
    if not entries:
        return None
    if len(entries) < len(found):
        raise LoadError(f"--dataset-path: {path} holds both conversations and lengths")
    return [(said[0].value, said[1].value) for said in entries if len(said) > 1]


def fits(prompt: int, output: int, given: bool) -> bool:
    """Whether vLLM's benchmark takes a conversation of these tokens; an output that is `given` may be short."""
    long_enough = prompt >= MIN_TOKENS and (given or output >= MIN_TOKENS)
    return long_enough and prompt <= MAX_PROMPT and prompt + output <= MAX_BOTH


async def take(said: Sequence[tuple[str, str]], wanted: int, output: int | None, count: Count) -> list[Turn]:
    """The first `wanted` conversations that fit, or all; `output` is the tokens of each answer, if given."""
    found: list[Turn] = []
    for start in range(0, len(said), AT_ONCE):
        some = said[start : start + AT_ONCE]
        prompts = await asyncio.gather(*(count(prompt) for prompt, _ in some))
        outputs = [output or 0] * len(some)
        if output is None:
            outputs = await asyncio.gather(*(count(answer) for _, answer in some))
        for (text, _), prompt, length in zip(some, prompts, outputs, strict=True):
            if fits(prompt, length, output is not None):
                found.append(Turn(text, length))
        if len(found) >= wanted:
            return found[:wanted]
    return found


async def ask(
    said: Sequence[tuple[str, str]], wanted: int, output: int | None, root: str, headers: dict[str, str], model: str
) -> list[Turn]:
    """`take` with the tokenizer of the server at `root`. Raises LoadError."""
    async with aiohttp.ClientSession(headers=headers) as session:

        async def count(text: str) -> int:
            try:
                async with session.post(root + "/tokenize", json={"model": model, "prompt": text}) as response:
                    answer = await response.read()
                    if response.status == 413:  # larger than any body for this model, so too long here
                        return MAX_BOTH + 1
                    if response.status != 200:
                        raise LoadError(
                            f"{root}/tokenize, which is to count the tokens of --dataset-path's texts, answers"
                            f" {response.status}: {answer.decode(errors='replace')[:200]}; files of lengths need none"
                        )
                return msgspec.json.decode(answer, type=_Counted).count
            except (aiohttp.ClientError, OSError, msgspec.DecodeError) as error:
                raise LoadError(f"{root}/tokenize does not count tokens: {error or type(error).__name__}") from error

        found = await take(said, wanted, output, count)
    if not found:
        raise LoadError(
            f"--dataset-path: no conversation has a prompt of {MIN_TOKENS} to {MAX_PROMPT} tokens, an answer of"
            f" {MIN_TOKENS} or more, and {MAX_BOTH} or fewer together"
        )
    if len(found) < wanted:
        print(f"aiollm: {len(found)} conversations fit; they are asked again from the first", file=sys.stderr)
    return found
