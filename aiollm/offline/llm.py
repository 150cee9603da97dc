"""A model in this process, for programs without an event loop: the loop runs in a thread of its own."""

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from typing import Any, TypeVar

import uvloop

from aiollm.offline.async_llm import AsyncLLM, Messages, Prompt
from aiollm.offline.outputs import EmbeddingRequestOutput, RequestOutput, SamplingParams

T = TypeVar("T")
PATIENCE = 0.5
"""Seconds. Whoever was interrupted just before it waits for a lock waits to the end: so each wait is short."""


class LLM:
    """`model` and `settings` are those of the command line, under any of their names, vLLM's among them:
    LLM("org/name", max_model_len=4096). Errors are those of AsyncLLM.

    The workers end with `close`, with the `with` block, with the last reference to the object, or with the program.
    """

    def __init__(self, model: str | os.PathLike[str] = "", **settings: Any) -> None:
        self._llm = AsyncLLM(model, **settings)
        self._loop = LoopThread(self._llm)
        self._close = weakref.finalize(self, self._loop.close)
        try:
            result(self._loop.loaded)
        except BaseException:  # Ctrl-C too
            self.close()
            raise

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers and give their memory back; what runs in other threads fails."""
        self._close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt; the outputs have the order of the prompts. One bad prompt ends it for all.

        `sampling_params` are for all prompts, or one for each. `use_tqdm` shows a bar, None does so on a terminal.
        """
        return self._loop.run(self._llm.generate(prompts, sampling_params, use_tqdm))

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | None = None,
        **fields: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several; `fields` are others of POST /v1/chat/completions."""
        return self._loop.run(self._llm.chat(messages, sampling_params, use_tqdm, **fields))

    def embed(
        self, prompts: Prompt | Sequence[Prompt], use_tqdm: bool | None = None, dimensions: int | None = None
    ) -> list[EmbeddingRequestOutput]:
        """The vector of each prompt, as POST /v1/embeddings gives it, in the order of the prompts."""
        return self._loop.run(self._llm.embed(prompts, use_tqdm, dimensions))

    def stream(
        self, prompt: Prompt | Messages, sampling_params: SamplingParams | None = None, **fields: Any
    ) -> Iterator[RequestOutput]:
        """The output of one prompt or conversation again and again, each time with all that has come so far."""
        outputs = self._llm.stream(prompt, sampling_params, **fields)

        turn = asyncio.Lock()  # a step that was interrupted ends before its generator is closed

        async def following() -> RequestOutput | None:
            async with turn:
                return await anext(outputs, None)

        async def end() -> None:
            async with turn:
                await outputs.aclose()

        try:
            while (output := self._loop.run(following())) is not None:
                yield output
        finally:
            if not self._loop.closed:
                self._loop.run(end())


class LoopThread:
    """The event loop in which a model lives, in a thread that ends with it."""

    def __init__(self, llm: AsyncLLM) -> None:
        self.loaded: Future[None] = Future()
        """Holds the error where the model could not be loaded."""
        self.closed = False
        self._lock = threading.Lock()
        self._loop = uvloop.new_event_loop()
        self._life = self._loop.create_task(self._live(llm))
        self._thread = threading.Thread(target=self._run, name="aiollm", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it in the loop and wait for it; an interrupt ends it, and not the loop."""
        future: Future[T] | None = None
        try:
            with self._lock:
                if self.closed:
                    raise RuntimeError("this LLM is closed")
                future = asyncio.run_coroutine_threadsafe(work, self._loop)
            return result(future)
        except CancelledError:
            raise RuntimeError("this LLM was closed meanwhile") from None
        except BaseException:
            if future is not None:
                future.cancel()
            else:
                with contextlib.suppress(ValueError):  # the loop has begun it already
                    work.close()
            raise

    def close(self) -> None:
        """Unload the model and end the thread, waiting for it in any other; once more does nothing."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # its loop has ended by itself
                self._loop.call_soon_threadsafe(self._life.cancel)
            if self._thread is not threading.current_thread():  # garbage is collected in any thread
                self._thread.join()

    async def _live(self, llm: AsyncLLM) -> None:
        try:
            async with llm:
                self.loaded.set_result(None)
                await asyncio.Event().wait()
        except BaseException as error:
            if self.loaded.done():
                raise
            self.loaded.set_exception(error)

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._life)
        with self._lock:
            self.closed = True
        self._loop.run_until_complete(_end_all())
        self._loop.close()


def result(future: Future[T]) -> T:
    """Wait for it; an interrupt is heard meanwhile."""
    while not wait([future], PATIENCE).done:
        pass
    return future.result()


async def _end_all() -> None:
    """Cancel whatever else the loop was given: somebody waits for it."""
    await asyncio.sleep(0)  # what was handed over last is a task behind this
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
