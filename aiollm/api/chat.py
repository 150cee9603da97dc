"""POST /v1/chat/completions."""

from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from aiollm.api import body, thoughts, tools
from aiollm.api.answer import answer
from aiollm.api.caller import Caller, caller
from aiollm.api.choice import Choice, Delta, Entry, Output
from aiollm.api.convert import output_limit, prompt_array, sampling_params, shortened, truncated
from aiollm.api.errors import invalid
from aiollm.api.generation import Generation, Prompt, Usage
from aiollm.api.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from aiollm.api.parts import PARTS, Parts
from aiollm.api.schema import ChatRequest, StreamOptions, decode_chat
from aiollm.api.shape import DONE, END, Shape, Template
from aiollm.api.structured import asked_grammars, constraints
from aiollm.api.turn import Turn
from aiollm.text.chat import PLACES, NameTaken
from aiollm.text.folder import TextError
from aiollm.text.parsers.source import Event

encode = msgspec.json.encode
PLAIN_END = b'},"logprobs":null,"finish_reason":null}' + END  # of most events: text and nothing else


async def chat_completions(http: web.Request) -> web.StreamResponse:
    """Answer a chat request; every refusal comes before the first byte of a 200."""
    parts = http.app[PARTS]
    data = await body.read(http, parts.body_limit, parts.settings.body_timeout)
    request = await body.identified(http, data, decode_chat)
    return await answer(http, request, *await prepared(parts, request, caller(http)))


async def prepared(parts: Parts, request: ChatRequest, caller: Caller) -> tuple[Generation, Shape]:
    """What a request asks for, ready to be submitted. Raises ApiError where it cannot be run."""
    parts.served_name(request.model)
    parts.engine.check_room(caller.name)
    prompt = await chat_prompt(parts, request)
    generation = Generation(parts, request, "chatcmpl", [prompt], caller)
    return generation, ChatShape(parts, request, generation)


async def chat_prompt(parts: Parts, request: ChatRequest) -> Prompt:
    """The prompt of a chat. Raises ApiError for what cannot be rendered or run."""
    tools.check_choice(parts, request)
    text, ids = await rendered_ids(parts, request)
    array = await body.in_thread_if(len(ids) > body.THREAD_IDS, prompt_array, parts, ids, "messages")
    name, asked = request.length
    if asked == 0 and request.prompt_logprobs is None:
        raise invalid(name, f"{name}: expected at least 1; 0 is only allowed with prompt_logprobs")
    default = parts.defaults.max_new_tokens
    array = shortened(parts, truncated(parts, request, array, asked, default), asked, default)
    max_tokens = output_limit(parts, len(array), asked, default, "messages")
    top = (request.top_logprobs or 0) if request.logprobs else -1
    output = Output(
        stops=request.stops,
        include_stop=request.includes_stop,
        skip_special_tokens=request.skip_special_tokens is not False,
        spaces_between_special_tokens=request.spaces_between_special_tokens is not False,
        keep_entries=request.logprobs is True,
        end_entry=request.logprobs is True and request.return_token_ids is True,
        discard=max_tokens == 0,
    )
    scores = -1 if request.prompt_logprobs is None else request.prompt_logprobs
    wanted = asked_grammars(request)
    opened = thoughts.opened(parts, request, text)
    output = tools.read(output, parts, request, opened)
    grammars = [*wanted, *tools.grammars(parts, request, guard=not wanted)]
    begins = thoughts.begins(parts, opened) if grammars else None
    constrained = await constraints(parts, request, grammars, begins)
    constrained += thoughts.limits(parts, request, opened, constrained)
    return Prompt(array, sampling_params(parts, request, max_tokens, top, scores, constrained), output)


async def rendered_ids(parts: Parts, request: ChatRequest) -> tuple[str, list[int]]:
    """A chat as its template writes it and as the model reads it. Raises ApiError for what cannot be rendered."""
    try:
        text = await _rendered(parts, request)
        return text, await parts.tokenizer.encode_async(text, request.add_special_tokens is True)
    except TextError as error:
        named = str(error).startswith(("chat_template_kwargs", "continue_final_message", *PLACES))
        param = str(error).split(":")[0].split(" ")[0] if named else "messages"
        raise invalid(param, str(error), "not_allowed" if isinstance(error, NameTaken) else "invalid_value") from error


async def _rendered(parts: Parts, request: ChatRequest) -> str:
    kwargs: dict[str, Any] = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        kwargs["reasoning_effort"] = request.reasoning_effort
    return await parts.rendered(
        request.messages,
        add_generation_prompt=request.add_generation_prompt is not False,
        continue_final_message=request.continue_final_message is True,
        documents=request.documents,
        role_settings=request.role_settings,
        character_settings=request.character_settings,
        tools=tools.for_template(tools.offered(request)),
        kwargs=kwargs,
    )


class ChatShape:
    """answer.Shape of chat: role chunks first, then content, then one finish chunk a choice."""

    done = DONE

    def __init__(self, parts: Parts, request: ChatRequest, generation: Generation) -> None:
        self._generation = generation
        self._names = TokenNames(parts.tokenizer, request.return_tokens_as_token_ids is True)
        self._logprobs = request.logprobs is True
        self._token_ids = request.return_token_ids is True
        self._scores = request.prompt_logprobs is not None
        self._tells_usage = (request.stream_options or StreamOptions()).continuous_usage_stats
        self._sent = [0] * len(generation.choices)
        kind = "chat.completion.chunk" if request.streams else "chat.completion"
        self._template = Template(generation, kind)
        self._heads = [b'{"index":%d,"delta":{"content":' % choice.index for choice in generation.choices]
        self._starts = [self._template.head + head for head in self._heads]
        self._plain = not (self._logprobs or self._token_ids)
        self._turns = [Turn(parts.speech.calls) for _ in generation.choices]

    def opening(self) -> bytes:
        return b"".join(
            self._template.event(
                b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
                % choice.index,
                self._generation.usage if self._tells_usage else None,
                more=self._prompt_ids() if choice.index == 0 else b"",
            )
            for choice in self._generation.choices
        )

    def delta(self, choice: Choice, delta: Delta, usage: Usage | None) -> bytes:
        if delta.events is not None:
            return self._said(choice, delta, delta.events, usage)
        if self._plain and usage is None:
            return self._starts[choice.index] + encode(delta.text) + PLAIN_END
        logprobs = encode(chat_logprobs(delta.entries, self._names)) if self._logprobs else b"null"
        parts = (self._heads[choice.index], encode(delta.text), b'},"logprobs":', logprobs, b',"finish_reason":null')
        return self._template.event(b"".join((*parts, self._new_ids(choice), b"}")), usage)

    def _said(self, choice: Choice, delta: Delta, events: Sequence[Event], usage: Usage | None) -> bytes:
        """An event for each thing that was said; the first brings the logprobs of all."""
        pieces = [piece for event in events if (piece := self._turns[choice.index].piece(event)) is not None]
        entries, found = delta.entries, []
        for piece in pieces or ([{}] if entries else []):
            logprobs = encode(chat_logprobs(entries, self._names)) if self._logprobs and entries else b"null"
            entries = ()
            body = b'{"index":%d,"delta":%s,"logprobs":%s,"finish_reason":null%s}' % (
                choice.index, encode(piece), logprobs, self._new_ids(choice),
            )  # fmt: skip
            found.append(self._template.event(body, usage))
        return b"".join(found)

    def closing(self, choice: Choice, delta: Delta | None, usage: Usage | None) -> bytes:
        assert choice.finish is not None
        last = self.delta(choice, delta, usage) if delta is not None else b""
        end = b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":%s,"stop_reason":%s%s}' % (
            choice.index, encode(choice.reason), encode(choice.finish.stop), self._new_ids(choice),
        )  # fmt: skip
        return last + self._template.event(end, usage)

    def usage(self, usage: Usage) -> bytes:
        return self._template.event(b"", usage)

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(choice, choice.take() or Delta("")) for choice in self._generation.choices]
        document = {**self._template.fields, "choices": choices, "usage": self._generation.usage}
        if self._scores:
            document["prompt_logprobs"] = prompt_logprobs(self._generation.choices[0], self._names)
        return document | ({"prompt_token_ids": self._prompt_list()} if self._token_ids else {})

    def _choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        assert choice.finish is not None
        return {
            "index": choice.index,
            "message": self._message(choice, delta),
            "logprobs": self._whole_logprobs(delta.entries),
            "finish_reason": choice.reason,
            "stop_reason": choice.finish.stop,
        } | ({"token_ids": choice.ids} if self._token_ids else {})

    def _message(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        if delta.events is None:
            return {"role": "assistant", "content": delta.text}
        return self._turns[choice.index].message(delta.events)

    def _whole_logprobs(self, entries: Sequence[Entry]) -> dict[str, Any] | None:
        return chat_logprobs(entries, self._names) if self._logprobs else None

    def _new_ids(self, choice: Choice) -> bytes:
        """The generated ids that no chunk has told yet, as a field."""
        if not self._token_ids:
            return b""
        ids = choice.ids[self._sent[choice.index] :]
        self._sent[choice.index] += len(ids)
        return b',"token_ids":' + encode(ids)

    def _prompt_ids(self) -> bytes:
        return b',"prompt_token_ids":' + encode(self._prompt_list()) if self._token_ids else b""

    def _prompt_list(self) -> list[int]:
        prompt: list[int] = self._generation.choices[0].request.prompt.tolist()
        return prompt
