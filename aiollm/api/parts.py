"""What the handlers work with, put together once."""

import asyncio
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from aiollm.api.errors import ApiError
from aiollm.api.grammars import Grammars
from aiollm.api.messages import Message
from aiollm.api.metrics import Metrics
from aiollm.api.schema import SamplingDefaults
from aiollm.api.turns import Starts, Turns, wake
from aiollm.engine.engine import Engine
from aiollm.text.chat import ChatTemplate
from aiollm.text.folder import TextError
from aiollm.text.limit import within
from aiollm.text.parsers.formats import Speech, speech
from aiollm.text.tokenizer import Tokenizer

TYPED = ("user", "tool", "function")
"""Roles of messages that come from outside: what looks like a special token there may be meant to deceive."""


class ModelInfo(NamedTuple):
    """`names` are what clients may call the model, the first one first; `root` is where it came from."""

    names: tuple[str, ...]
    created: int
    root: str


class Settings(NamedTuple):
    """Times are seconds, sizes bytes."""

    max_n: int = 128
    """Choices of one prompt."""
    max_choices: int = 1024
    """Choices of one HTTP request, over all of its prompts."""
    bytes_per_token: int = 16
    body_allowance: int = 4 * 1024 * 1024
    """A body may have this and bytes_per_token for each token of the context."""
    body_timeout: float = 30
    keep_alive: float = 15
    """Silence on a stream after which a comment is sent, so that no proxy gives the connection up."""
    write_timeout: float = 60
    """A client that reads nothing for so long is cut off."""
    render_timeout: float = 5
    """For a chat template, which is a program that came with the model."""
    long_truncation_mode: str = "none"
    """What becomes of prompts that are too long: "none" refuses them, "head" and "center" cut that part out."""
    allowed_origins: tuple[str, ...] = ()
    """Of pages that may open a chat socket beside this server's own."""
    log_prompts: bool = False
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    """Names in text/parsers/formats.py; auto goes by the chat template."""
    shown: Mapping[str, Any] = MappingProxyType({})
    """Of the server's settings, those that clients may read."""


class Parts(NamedTuple):
    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate
    model: ModelInfo
    defaults: SamplingDefaults
    settings: Settings
    metrics: Metrics
    grammars: Grammars
    speech: Speech
    wakes: Turns[asyncio.Event]
    starts: Starts

    @property
    def context(self) -> int:
        """The longest sequence that can run, prompt and output together; EngineBusy while the model loads."""
        return self.engine.limits.longest

    @property
    def room(self) -> int:
        """The longest prompt behind which nothing is generated; EngineBusy while the model loads."""
        return self.engine.limits.room

    @property
    def vocabulary(self) -> int:
        """Token ids below this are known to both the model and the tokenizer."""
        ready = self.engine.ready
        return min(self.tokenizer.vocab_size, ready.vocabulary) if ready else self.tokenizer.vocab_size

    @property
    def body_limit(self) -> int:
        return self.settings.bytes_per_token * self.context + self.settings.body_allowance

    async def rendered(self, messages: Sequence[Message], **options: Any) -> str:
        """A chat as the model's template writes it, with the arguments of ChatTemplate.render; beside the event loop.

        Raises TextError, also where it takes longer than `render_timeout`.
        """

        def render() -> str:
            chat = [self._typed(message) for message in msgspec.to_builtins(messages)]
            return self.template.render(
                chat, **options | {"documents": self.tokenizer.marked(options.get("documents"))}
            )

        try:
            text = await within(self.settings.render_timeout, render)
        except TimeoutError:
            limit = self.settings.render_timeout
            raise TextError(f"the model's chat template was not done with them after {limit:g} s") from None
        await self.starts.turn()  # threads have done many while the loop was busy
        return text

    def _typed(self, message: dict[str, Any]) -> dict[str, Any]:
        marked: dict[str, Any] = self.tokenizer.marked(message) if message["role"] in TYPED else message
        return marked

    def served_name(self, asked: str | None) -> str:
        """The name to answer under. Raises ApiError for one that is not served."""
        if not asked or asked in self.model.names:
            return asked or self.model.names[0]
        message = f"The model `{asked[:200]}` does not exist; this server has: {', '.join(self.model.names)}"
        raise ApiError(404, message, code="model_not_found", param="model")


def make_parts(
    engine: Engine,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    model: ModelInfo,
    generation_config: Mapping[str, Any],
    settings: Settings,
) -> Parts:
    """`generation_config` is the model's generation_config.json: sampling defaults. Raises ValueError where one of them
    is out of range."""
    try:
        defaults = msgspec.convert(dict(generation_config), SamplingDefaults)
    except msgspec.ValidationError as error:
        raise ValueError(f"generation_config.json: {error}") from error
    metrics = Metrics(engine)
    engine.on_header, engine.on_cost = metrics.on_header, metrics.on_cost
    spoken = speech(template.source, settings.tool_call_parser, settings.reasoning_parser)
    grammars, wakes, starts = Grammars(tokenizer), Turns(wake), Starts()
    return Parts(engine, tokenizer, template, model, defaults, settings, metrics, grammars, spoken, wakes, starts)


PARTS = web.AppKey("parts", Parts)
ENGINE = web.AppKey("engine", Engine)
METRICS = web.AppKey("metrics", Metrics)
