"""One client process of `aiollm bench serve`: python -m aiollm.bench.client, told what to do on stdin.

It reads a `Setup` as one line of JSON, says "ready", reads the second at which to start, and writes one `Report`. While
it runs it tells of each request that has ended, as a line with a number. Times are of CLOCK_MONOTONIC, which all
processes of a machine share.
"""

import asyncio
import sys
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import msgspec
import uvloop

from aiollm.bench.workloads import Job, Turn


class Setup(msgspec.Struct, frozen=True):
    """The share of one process."""

    url: str
    headers: dict[str, str]
    body: dict[str, Any]
    """What all requests have in common."""
    chat: bool
    """Prompts go out as messages of a user."""
    concurrency: int | None
    """Conversations at once, at most."""
    timeout: float
    """Seconds for one request."""
    seeds: int | None
    """Seed of the first request where each has one of its own."""
    jobs: list[Job]


class Outcome(msgspec.Struct):
    """One request. Times are seconds; `times` are those of every event that brought tokens."""

    sent: float
    prompt: int = 0
    output: int = 0
    cached: int = 0
    times: list[float] = []
    ended: float = 0.0
    error: str = ""


class Report(msgspec.Struct, frozen=True):
    outcomes: list[Outcome]
    cpu_share: float
    """Of one core. A client that is busy all the time measures itself."""


class _Message(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    """As far as it is read here; `delta` only in chats."""

    token_ids: list[int] | None = None
    delta: _Message | None = None
    finish_reason: str | None = None

    @property
    def brings_tokens(self) -> bool:
        """The first event of a chat brings the role alone."""
        return (
            self.delta is None
            or bool(self.delta.content or self.delta.reasoning_content)
            or self.finish_reason is not None
        )


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: dict[str, Any] | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class Client:
    """Runs the conversations of one process."""

    def __init__(self, setup: Setup, session: aiohttp.ClientSession) -> None:
        self._setup, self._session = setup, session
        self.outcomes: list[Outcome] = []
        self._numbers = iter(range(1 << 62)) if setup.seeds is None else iter(range(setup.seeds, 1 << 62))

    async def run(self, began: float) -> None:
        """Everything, from the second `began` on."""
        await asyncio.sleep(began - time.monotonic())
        jobs = self._setup.jobs
        if self._setup.concurrency is None:
            await asyncio.gather(*(self._at(began, job) for job in jobs))
        else:
            waiting = iter(jobs)
            await asyncio.gather(*(self._one_by_one(began, waiting) for _ in range(self._setup.concurrency)))

    async def _at(self, began: float, job: Job) -> None:
        await asyncio.sleep(began + job.at - time.monotonic())
        await self._converse(job)

    async def _one_by_one(self, began: float, jobs: Iterator[Job]) -> None:
        for job in jobs:
            await self._at(began, job)

    async def _converse(self, job: Job) -> None:
        """The turns of a conversation; the later ones are skipped, and counted as failed, where one fails."""
        said: list[int] = []
        failed = ""
        for turn in job.turns:
            outcome = Outcome(time.monotonic(), error=failed and f"an earlier turn failed: {failed}")
            if not failed:
                said = await self._ask(said, turn, outcome, len(job.turns) > 1)
                failed = outcome.error
            self.outcomes.append(outcome)
            print(len(self.outcomes), flush=True)

    async def _ask(self, said: list[int], turn: Turn, outcome: Outcome, wants_ids: bool) -> list[int]:
        """Send one request and read its stream; all ids of the conversation so far, where `wants_ids`."""
        data, prompt = self._body(said, turn, wants_ids)
        ids: list[int] = []
        outcome.sent = time.monotonic()
        try:
            async with self._session.post(self._setup.url, data=data) as response:
                if response.status != 200:
                    raise RuntimeError(f"status {response.status}: {(await response.text())[:200]}")
                async for now, event in _events(response):
                    if event is None:
                        break
                    if event.error is not None:
                        raise RuntimeError(f"error event: {event.error!s:.200}")
                    if event.choices and event.choices[0].brings_tokens:
                        outcome.times.append(now)
                        ids += event.choices[0].token_ids or ()
                    if event.usage is not None:
                        _count(outcome, event.usage)
            outcome.output = outcome.output or len(outcome.times)  # a server that tells no usage
            if not outcome.times:
                raise RuntimeError("the stream ended without a token")
        except (aiohttp.ClientError, OSError, TimeoutError, RuntimeError, msgspec.DecodeError) as error:
            outcome.error = str(error) or type(error).__name__
        outcome.ended = outcome.times[-1] if outcome.times else time.monotonic()
        if not wants_ids:
            return []
        assert isinstance(prompt, list)
        return prompt + (ids or [prompt[-1]] * turn.output)  # a server that tells no ids: only prompts can be cached

    def _body(self, said: list[int], turn: Turn, wants_ids: bool) -> tuple[bytes, list[int] | str]:
        """The encoded request, and its prompt."""
        prompt = turn.prompt if isinstance(turn.prompt, str) else said + turn.prompt
        asked = {"messages": [{"role": "user", "content": prompt}]} if self._setup.chat else {"prompt": prompt}
        own: dict[str, Any] = asked | {"max_tokens": turn.output}
        if wants_ids:
            own["return_token_ids"] = True
        if self._setup.seeds is not None:
            own["seed"] = next(self._numbers)
        return msgspec.json.encode(self._setup.body | own), prompt


async def _events(response: aiohttp.ClientResponse) -> Any:
    """(time of arrival, event) of a stream; the event is None for its end."""
    rest = b""
    async for data in response.content.iter_any():
        now = time.monotonic()
        *whole, rest = (rest + data).split(b"\n\n")
        for event in whole:
            if event.startswith(b"data:"):
                content = event[5:].strip()
                yield now, None if content == b"[DONE]" else _decode(content)


def _count(outcome: Outcome, usage: _Usage) -> None:
    outcome.prompt, outcome.output = usage.prompt_tokens, usage.completion_tokens
    outcome.cached = int((usage.prompt_tokens_details or {}).get("cached_tokens") or 0)


async def main() -> None:
    """Obey stdin."""
    setup = msgspec.json.decode(sys.stdin.buffer.readline(), type=Setup)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=setup.timeout)
    headers = {"Content-Type": "application/json"} | setup.headers
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        client = Client(setup, session)
        print("ready", flush=True)
        began = float(sys.stdin.buffer.readline())
        cpu, wall = time.process_time(), time.monotonic()
        await client.run(began)
        share = (time.process_time() - cpu) / (time.monotonic() - max(wall, began) or 1)
    sys.stdout.buffer.write(msgspec.json.encode(Report(client.outcomes, round(share, 3))) + b"\n")


if __name__ == "__main__":
    try:
        uvloop.run(main())
    except KeyboardInterrupt:
        sys.exit(130)
