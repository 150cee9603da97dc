"""POST /v1/completions."""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from aiollm.api import body
from aiollm.api.answer import answer
from aiollm.api.caller import Caller, caller
from aiollm.api.choice import Choice, Delta, Entry, Output
from aiollm.api.convert import output_limit, prompt_array, sampling_params, shortened, truncated
from aiollm.api.errors import invalid
from aiollm.api.generation import Generation, Prompt, Usage, check_choices
from aiollm.api.logprobs import TokenNames, completion_logprobs, prompt_logprobs
from aiollm.api.parts import PARTS, Parts
from aiollm.api.schema import CompletionRequest, decode_completion
from aiollm.api.shape import DONE, END, Shape, Template
from aiollm.api.structured import asked_grammars, constraints
from aiollm.text.folder import TextError
from aiollm.wire.sampling import Constraint

DEFAULT_MAX_TOKENS = 16
DECODE_IDS = 10_000  # take 1 ms
encode = msgspec.json.encode
# Of most events: text and nothing else.
PLAIN_END = b',"logprobs":null,"finish_reason":null,"stop_reason":null}' + END


async def completions(http: web.Request) -> web.StreamResponse:
    """Answer a completion request; every refusal comes before the first byte of a 200."""
    parts = http.app[PARTS]
    data = await body.read(http, parts.body_limit, parts.settings.body_timeout)
    request = await body.identified(http, data, decode_completion)
    return await answer(http, request, *await prepared(parts, request, caller(http)))


async def prepared(parts: Parts, request: CompletionRequest, caller: Caller) -> tuple[Generation, Shape]:
    """What a request asks for, ready to be submitted. Raises ApiError where it cannot be run."""
    parts.served_name(request.model)
    parts.engine.check_room(caller.name)
    listed = await body.in_thread_if(len(request.prompt) > body.THREAD_IDS, lambda: request.prompts)
    check_choices(parts, request, len(listed))  # before any of them takes time
    constrained = await constraints(parts, request, asked_grammars(request))
    prompts = []
    for prompt in listed:
        prompts.append(await _prompt(parts, request, prompt, constrained))
        await asyncio.sleep(0)  # 1,024 short prompts take 31 ms
    generation = Generation(parts, request, "cmpl", prompts, caller)
    return generation, CompletionShape(parts, request, generation)


async def _prompt(
    parts: Parts, request: CompletionRequest, prompt: str | list[int], constrained: tuple[Constraint, ...]
) -> Prompt:
    if isinstance(prompt, str):
        try:
            ids = await parts.tokenizer.encode_async(prompt, request.add_special_tokens is not False, typed=True)
        except TextError as error:
            raise invalid("prompt", f"prompt: {error}") from error
    else:
        ids = prompt
    array = await body.in_thread_if(len(ids) > body.THREAD_IDS, prompt_array, parts, ids, "prompt")
    name, asked = request.length
    array = truncated(parts, request, array, asked, DEFAULT_MAX_TOKENS)
    array = shortened(parts, array, asked, DEFAULT_MAX_TOKENS)
    max_tokens = output_limit(parts, len(array), asked, DEFAULT_MAX_TOKENS, "prompt")
    if max_tokens == 0 and not request.echo and request.prompt_logprobs is None:
        raise invalid(name, f"{name}: expected at least 1; 0 is only allowed with echo: true or prompt_logprobs")
    echo_text = prompt if request.echo and isinstance(prompt, str) and len(array) == len(ids) else None
    scores_text = echo_text is not None and request.logprobs is not None
    lead = await body.in_thread_if(len(ids) > DECODE_IDS, _lead, parts, ids, echo_text) if scores_text else None
    top = request.logprobs if request.logprobs is not None else -1
    output = Output(
        stops=request.stops,
        include_stop=request.includes_stop,
        skip_special_tokens=request.skip_special_tokens is not False,
        spaces_between_special_tokens=request.spaces_between_special_tokens is not False,
        keep_entries=request.logprobs is not None or request.drawn > (request.n or 1),
        # Who scores a prompt counts from both ends: lm-eval takes the last entry for the one token that it asked for.
        end_entry=request.logprobs is not None and (request.return_token_ids is True or request.echo is True),
        echo=request.echo is True,
        echo_text=echo_text,
        echo_lead=lead,
        discard=max_tokens == 0,
    )
    scores = request.prompt_logprobs if request.prompt_logprobs is not None else top if request.echo else -1
    return Prompt(array, sampling_params(parts, request, max_tokens, top, scores, constrained), output)


def _lead(parts: Parts, ids: Sequence[int], text: str) -> int | None:
    """How many characters the ids have before a text that they encode; None where they do not end with it."""
    decoded = parts.tokenizer.decode(ids, skip_special_tokens=False)
    return len(decoded) - len(text) if decoded.endswith(text) else None


class CompletionShape:
    """answer.Shape of text completions: the last piece of a choice carries its finish reason."""

    done = DONE

    def __init__(self, parts: Parts, request: CompletionRequest, generation: Generation) -> None:
        self._generation = generation
        self._names = TokenNames(parts.tokenizer, request.return_tokens_as_token_ids is True)
        self._logprobs = request.logprobs is not None
        self._token_ids = request.return_token_ids is True
        self._scores = request.prompt_logprobs is not None
        self._sent = [0] * len(generation.choices)
        self._template = Template(generation, "text_completion")
        self._heads = [b'{"index":%d,"text":' % choice.index for choice in generation.choices]
        self._starts = [self._template.head + head for head in self._heads]
        self._plain = not (self._logprobs or self._token_ids)

    def opening(self) -> bytes:
        return b""

    def delta(self, choice: Choice, delta: Delta, usage: Usage | None) -> bytes:
        if self._plain and usage is None:
            return self._starts[choice.index] + encode(delta.text) + PLAIN_END
        return self._event(choice, delta, usage, b',"finish_reason":null,"stop_reason":null')

    def closing(self, choice: Choice, delta: Delta | None, usage: Usage | None) -> bytes:
        assert choice.finish is not None
        end = b',"finish_reason":%s,"stop_reason":%s' % (encode(choice.finish.reason), encode(choice.finish.stop))
        return self._event(choice, delta or Delta(""), usage, end)

    def usage(self, usage: Usage) -> bytes:
        return self._template.event(b"", usage)

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(choice, choice.take() or Delta("")) for choice in self._generation.choices]
        return {**self._template.fields, "choices": choices, "usage": self._generation.usage}

    def _event(self, choice: Choice, delta: Delta, usage: Usage | None, end: bytes) -> bytes:
        logprobs = encode(self._shaped(delta.entries))
        text = (self._heads[choice.index], encode(delta.text), b',"logprobs":', logprobs, end, self._ids(choice), b"}")
        return self._template.event(b"".join(text), usage)

    def _choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        assert choice.finish is not None
        ids = {"prompt_token_ids": choice.request.prompt.tolist(), "token_ids": choice.ids}
        return {
            "index": choice.index,
            "text": delta.text,
            "logprobs": self._shaped(delta.entries),
            "finish_reason": choice.finish.reason,
            "stop_reason": choice.finish.stop,
            **({"prompt_logprobs": self._prompt_logprobs(choice)} if self._scores else {}),
        } | (ids if self._token_ids else {})

    def _prompt_logprobs(self, choice: Choice) -> list[Any]:
        return prompt_logprobs(self._generation.first_of(choice), self._names)

    def _shaped(self, entries: Sequence[Entry]) -> dict[str, Any] | None:
        return completion_logprobs(entries, self._names) if self._logprobs else None

    def _ids(self, choice: Choice) -> bytes:
        """The generated ids that no chunk has told yet, as a field; the first one brings the prompt's."""
        if not self._token_ids:
            return b""
        sent = self._sent[choice.index]
        ids = choice.ids[sent:]
        self._sent[choice.index] += len(ids)
        prompt = b"" if sent else b',"prompt_token_ids":' + encode(choice.request.prompt.tolist())
        return prompt + b',"token_ids":' + encode(ids)
