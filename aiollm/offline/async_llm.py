"""A model in this process's own event loop, without a server: `async with AsyncLLM("org/name") as llm`."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from tqdm import tqdm

from aiollm import arguments
from aiollm.api.body import in_thread_if
from aiollm.api.errors import ApiError
from aiollm.api.generation import Generation
from aiollm.api.schema import ChatRequest, CompletionRequest
from aiollm.config import FIELDS, NETWORK
from aiollm.console import Console
from aiollm.engine.engine import EngineBusy
from aiollm.offline.outputs import Collector, EmbeddingRequestOutput, RequestOutput, SamplingParams, embedded
from aiollm.offline.session import CHAT, COMPLETIONS, EMBEDDINGS, Session, session

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or vLLM's {"prompt": text} or {"prompt_token_ids": ids}."""
Messages = Sequence[Mapping[str, Any]]
T = TypeVar("T")
DEFAULT = SamplingParams()
KNOWN = {
    CHAT: frozenset(ChatRequest.__struct_fields__),
    COMPLETIONS: frozenset(CompletionRequest.__struct_fields__),
}


class AsyncLLM:
    """`model` and `settings` are those of the command line, under any of their names: AsyncLLM("org/name", tp=2).

    Bad requests raise ValueError, which names the field; RuntimeError says why nothing can be computed.
    """

    def __init__(self, model: str | os.PathLike[str] = "", **settings: Any) -> None:
        given = {"model_dir": os.fspath(model)} if model else {}
        self._settings = arguments.given(settings | given, os.environ)
        for name in settings:
            field = FIELDS.get(name)
            if field is not None and field.setting.group == NETWORK:
                raise ValueError(f"{name}: of use only for a server; nothing listens here")
        self._stack = contextlib.AsyncExitStack()
        self._session: Session | None = None

    async def __aenter__(self) -> "AsyncLLM":
        console = Console() if sys.stderr.isatty() else None
        progress = console.progress if console is not None else _silent
        try:
            self._session = await self._stack.enter_async_context(session(self._settings, progress))
        finally:
            if console is not None:
                console.close()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._session = None
        await self._stack.aclose()

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt; the outputs have the order of the prompts. One bad prompt ends it for all.

        `sampling_params` are for all prompts, or one for each. `use_tqdm` shows a bar, None does so on a terminal.
        """
        return await self._run(COMPLETIONS, _listed(prompts), sampling_params, {}, use_tqdm)

    async def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | None = None,
        **fields: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several; `fields` are others of POST /v1/chat/completions."""
        listed = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        return await self._run(CHAT, listed, sampling_params, fields, use_tqdm)

    async def embed(
        self, prompts: Prompt | Sequence[Prompt], use_tqdm: bool | None = None, dimensions: int | None = None
    ) -> list[EmbeddingRequestOutput]:
        """The vector of each prompt, as POST /v1/embeddings gives it, in the order of the prompts."""
        listed = _listed(prompts)

        def body(index: int) -> bytes:
            return json.dumps({"input": listed[index], "dimensions": dimensions}).encode()

        def output(_: int, generation: Generation) -> EmbeddingRequestOutput:
            return embedded(generation, dimensions)

        return await self._each(EMBEDDINGS, len(listed), body, output, use_tqdm)

    async def stream(
        self, prompt: Prompt | Messages, sampling_params: SamplingParams | None = None, **fields: Any
    ) -> AsyncGenerator[RequestOutput]:
        """The output of one prompt or conversation again and again, each time with all that has come so far.

        Who leaves the loop early ends the request: `async with contextlib.aclosing(llm.stream(...))` does so at once.
        """
        chats = not isinstance(prompt, str | Mapping) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        path, asked = (CHAT, prompt) if chats else (COMPLETIONS, _plain(prompt))
        params = sampling_params or DEFAULT
        with _told(""):
            current = self._current
            data = _body(path, asked, params, fields | {"stream": True})
            generation, _ = await current.prepared(path, data, streams=True)
            collector = Collector(generation, current.parts, asked, params)
            generation.submit()
            try:
                finished = False
                while not finished:  # as was told: the end may come while a caller looks at the output before
                    await generation.changed.wait()
                    generation.changed.clear()
                    if (error := generation.failure()) is not None:
                        raise error
                    output = collector.output()
                    finished = output.finished
                    yield output
            finally:
                generation.end()

    async def _run(
        self,
        path: str,
        asked: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        fields: Mapping[str, Any],
        use_tqdm: bool | None,
    ) -> list[RequestOutput]:
        params = sampling_params if isinstance(sampling_params, Sequence) else [sampling_params or DEFAULT] * len(asked)
        if len(params) != len(asked):
            raise ValueError(f"sampling_params: {len(params)} for {len(asked)} prompts")
        parts = self._current.parts

        def body(index: int) -> bytes:
            return _body(path, asked[index], params[index], fields)

        def output(index: int, generation: Generation) -> RequestOutput:
            return Collector(generation, parts, asked[index], params[index]).output()

        return await self._each(path, len(asked), body, output, use_tqdm)

    async def _each(
        self,
        path: str,
        count: int,
        body: Callable[[int], bytes],
        output: Callable[[int, Generation], T],
        use_tqdm: bool | None,
    ) -> list[T]:
        """The outputs of so many bodies, in their order; the first one that fails ends all."""
        current = self._current
        outputs: dict[int, T] = {}
        hidden = None if use_tqdm is None else not use_tqdm
        bar = tqdm(total=count, unit="prompt", dynamic_ncols=True, disable=hidden)

        async def run(index: int) -> None:
            name = "messages" if path == CHAT else "prompts"
            with _told(f"{name}[{index}]: " if count > 1 else ""):
                generation, _ = await current.completed(path, body(index))
                outputs[index] = await in_thread_if(generation.long, output, index, generation)
            bar.update()

        failed: Sequence[Exception] = ()
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(count):
                    group.create_task(run(index))
                    await asyncio.sleep(0)  # the first ones are computed while the others are prepared
        except ExceptionGroup as errors:
            failed = errors.exceptions
        finally:
            bar.close()
        if failed:
            raise failed[0]
        return [outputs[index] for index in range(count)]

    @property
    def _current(self) -> Session:
        if self._session is None:
            raise RuntimeError("the model is not loaded: use this object in a `with` block, or before its close()")
        return self._session


def _body(path: str, asked: Any, params: SamplingParams, more: Mapping[str, Any]) -> bytes:
    """The body that a client would send to a server. Raises TypeError for a field that there is not."""
    if unknown := more.keys() - KNOWN[path]:
        raise TypeError(f"{min(unknown)}: there is no such field")
    fields = msgspec.to_builtins(params) | dict(more) | {"messages" if path == CHAT else "prompt": asked}
    if params.logprobs is not None:
        fields["return_token_ids"] = True  # a logprob for each of them
        fields |= {"logprobs": True, "top_logprobs": params.logprobs} if path == CHAT else {}
    return json.dumps(fields).encode()


def _listed(prompts: Any) -> list[Any]:
    """One prompt or several, each as text or a list of ids."""
    one = isinstance(prompts, str | Mapping) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [_plain(prompt) for prompt in ([prompts] if one else prompts)]


def _plain(prompt: Any) -> Any:
    """A prompt as text or a list of ids."""
    if isinstance(prompt, Mapping):
        if len(prompt) != 1 or prompt.keys().isdisjoint(("prompt", "prompt_token_ids")):
            raise ValueError(f"prompts: expected either prompt or prompt_token_ids, not {', '.join(map(str, prompt))}")
        (prompt,) = prompt.values()
    return prompt if isinstance(prompt, str) else list(prompt)


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Refusals and failures of the engine as Python's own exceptions; `where` goes before what they say."""
    try:
        yield
    except ApiError as error:
        kind = ValueError if error.status < 500 else RuntimeError
        raise kind(where + error.message) from error
    except EngineBusy as error:
        raise RuntimeError(str(error)) from error


def _silent(phase: str, fraction: float | None) -> None:
    """Nobody looks."""
