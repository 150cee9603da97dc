"""One conversation of a chat socket: from its `chat` frame to the frames of the answer."""

from collections.abc import AsyncGenerator

from aiohttp import web

from aiollm.api import body
from aiollm.api.answer import running
from aiollm.api.caller import NOBODY, Caller
from aiollm.api.chat import chat_prompt
from aiollm.api.choice import Delta as Said
from aiollm.api.errors import invalid
from aiollm.api.generation import Generation
from aiollm.api.parts import PARTS
from aiollm.api.schema import ChatRequest, decode_chat
from aiollm.api.turn import Turn
from aiollm.api.ws_frames import Delta, Done, Start
from aiollm.text.parsers.source import Content, Reasoning

ONLY_TEXT = ("logprobs", "return_token_ids")


class Conversation:
    """`ended` is set by whoever sends its last frame."""

    def __init__(self, http: web.Request, id: str, received: float, caller: Caller = NOBODY) -> None:
        """`http` is the request that opened the socket."""
        self.id = id
        self._http = http
        self._caller = caller
        self.ended = False
        self._parts = http.app[PARTS]
        self.received = received
        self.generation: Generation | None = None
        """None until it is submitted."""

    async def frames(self, data: bytes) -> AsyncGenerator[Start | Delta | Done, None]:
        """Run the request of a `chat` frame; closing the iterator aborts it. Raises ApiError and EngineBusy."""
        generation = await self._prepared(data)
        (choice,) = generation.choices
        turn = Turn(self._parts.speech.calls)
        with running(self._http, generation):
            self.generation = generation
            started = False
            while choice.finish is None:
                await generation.changed.wait()
                generation.changed.clear()
                if (error := generation.failure()) is not None:
                    raise error
                if not started:
                    started = True
                    request = choice.request
                    yield Start(self.id, len(request.prompt), request.cached_tokens, generation.id)
                delta = choice.take()
                if delta is not None:
                    yield self._delta(delta, choice.generated, turn)
            yield self.done(choice.reason)

    def _delta(self, delta: Said, tokens: int, turn: Turn) -> Delta:
        if delta.events is None:
            return Delta(self.id, delta.text, tokens)
        text, reasoning = (
            "".join(event.text for event in delta.events if isinstance(event, kind)) for kind in (Content, Reasoning)
        )
        pieces = [piece for event in delta.events if (piece := turn.piece(event)) is not None]
        calls = [call for piece in pieces for call in piece.get("tool_calls", ())]
        return Delta(self.id, text, tokens, reasoning, calls)

    def done(self, reason: str) -> Done:
        """The last frame, with the figures so far."""
        generation = self.generation
        if generation is None:
            return Done(self.id, reason, None, None, None)
        (choice,) = generation.choices
        ttft = pace = None
        if choice.first is not None:
            ttft = round((choice.first - self.received) * 1000, 3)
            if choice.generated > 1 and choice.last > choice.first:
                pace = round((choice.generated - 1) / (choice.last - choice.first), 3)
        return Done(self.id, reason, generation.usage, ttft, pace)

    async def _prepared(self, data: bytes) -> Generation:
        parts = self._parts
        await parts.starts.turn()
        request = await body.in_thread_if(len(data) > body.THREAD_BYTES, decode_chat, data, True)
        _check(request)
        parts.served_name(request.model)
        parts.engine.check_room(self._caller.name)
        prompt = await chat_prompt(parts, request)
        return Generation(parts, request, "chatcmpl", [prompt], self._caller)


def _check(request: ChatRequest) -> None:
    """Refuse what frames cannot carry."""
    if request.n not in (None, 1):
        raise invalid("n", "n: a conversation on a socket has one answer; start several", "unsupported_field")
    for name in ONLY_TEXT:
        value = getattr(request, name)
        if value is not None and value is not False:
            raise invalid(name, f"{name}: a socket carries text only", "unsupported_field")
