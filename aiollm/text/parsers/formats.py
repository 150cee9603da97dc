"""The formats by name, and which of them a model's chat template speaks."""

from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import NamedTuple

from aiollm.text.parsers.deepseek import BEGIN, BETWEEN, CALL, CALL_END, END, deepseek
from aiollm.text.parsers.deepseek import MARKS as DEEPSEEK
from aiollm.text.parsers.forced import Frame, forced, guarded
from aiollm.text.parsers.hermes import MARKS as HERMES
from aiollm.text.parsers.hermes import hermes
from aiollm.text.parsers.llama import MARKS as LLAMA
from aiollm.text.parsers.llama import guarded as llama_guard
from aiollm.text.parsers.llama import llama
from aiollm.text.parsers.mistral import ARGS, mistral
from aiollm.text.parsers.mistral import MARKS as MISTRAL
from aiollm.text.parsers.mistral import OPEN as TOOL_CALLS
from aiollm.text.parsers.pythonic import MARKS as PYTHONIC
from aiollm.text.parsers.pythonic import pythonic
from aiollm.text.parsers.reasoning import Style, reasoning
from aiollm.text.parsers.source import Event, Parser, Source, Steps
from aiollm.text.parsers.tagged import CLOSE, FUNCTION, GLM, KEY, OPEN, glm, qwen_coder
from aiollm.text.parsers.tagged_grammar import glm as glm_guard
from aiollm.text.parsers.tagged_grammar import qwen_coder as qwen_guard
from aiollm.text.parsers.tools import Tools
from aiollm.wire.sampling import Tag


class Format(NamedTuple):
    """How a model writes calls."""

    read: Callable[[Source, Tools], Steps[None]]
    marks: tuple[str, ...]
    """Some of them are special tokens, which must not be left out of the text."""
    id_chars: int = 24
    """Of the random part of a call's id."""
    id_prefix: str = "call_"
    frame: Frame | None = None
    """Of calls that are demanded; without one they are written, and read, as Hermes writes them."""
    guard: Callable[[Tools, Sequence[Tag]], str] | None = None
    """The grammar of any text in which calls are calls of these functions. Pythonic calls have none: their arguments
    are Python, and a schema becomes a grammar of JSON."""


HERMES_FRAME = Frame('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n", mark=OPEN)
LLAMA_FRAME = Frame('{"name": "', '", "parameters": ', "}", "; ")
MISTRAL_FRAME = Frame('{"name": "', '", "arguments": ', "}", ", ", TOOL_CALLS + "[", "]", TOOL_CALLS)
MISTRAL_ARGS_FRAME = Frame(TOOL_CALLS, ARGS, "", mark=TOOL_CALLS)
DEEPSEEK_FRAME = Frame(CALL, BETWEEN, CALL_END, "", BEGIN, END, BEGIN)
FORMATS = {
    "hermes": Format(hermes, HERMES, frame=HERMES_FRAME, guard=partial(guarded, HERMES_FRAME)),
    "llama3": Format(llama, LLAMA, frame=LLAMA_FRAME, guard=llama_guard),
    "mistral": Format(
        mistral, MISTRAL, id_chars=9, id_prefix="",  # what its templates insist on
        frame=MISTRAL_FRAME, guard=partial(guarded, MISTRAL_FRAME),
    ),
    "deepseek": Format(deepseek, DEEPSEEK, frame=DEEPSEEK_FRAME, guard=partial(guarded, DEEPSEEK_FRAME)),
    "glm": Format(glm, (OPEN, CLOSE, GLM.key, GLM.key_end, GLM.value, *GLM.value_ends), guard=glm_guard),
    "qwen3_coder": Format(qwen_coder, (OPEN, CLOSE), guard=qwen_guard),
    "pythonic": Format(pythonic, PYTHONIC),
}  # fmt: skip
MISTRAL_ARGS = FORMATS["mistral"]._replace(frame=MISTRAL_ARGS_FRAME, guard=partial(guarded, MISTRAL_ARGS_FRAME))
HERMES_FORMAT = FORMATS["hermes"]
STYLES = {
    "think": Style("<think>", "</think>"),
    "deepseek_r1": Style("<think>", "</think>", always=True),
    "mistral": Style("[THINK]", "[/THINK]"),
}


class Speech(NamedTuple):
    """What an output may consist of, beside plain text."""

    calls: Format | None = None
    reasoning: Style | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        tags = (self.reasoning.open, self.reasoning.close) if self.reasoning else ()
        return tags + (self.calls.marks if self.calls else ())

    @property
    def demanding(self) -> "Speech":
        """Where calls are demanded by the grammar of `forced`."""
        return self if self.calls is not None and self.calls.frame is not None else self._replace(calls=HERMES_FORMAT)

    def forced(self, tools: Tools, one: bool, tags: Sequence[Tag] = ()) -> str:
        """The grammar, in Lark's syntax, of an answer that calls one of these functions, or any number of them; `tags`
        are the marks of those calls."""
        calls = self.demanding.calls
        assert calls is not None and calls.frame is not None
        return forced(calls.frame, tools, one, tags)

    @property
    def guards(self) -> bool:
        """Whether there is `guarded`."""
        return self.calls is not None and self.calls.guard is not None

    def guarded(self, tools: Tools, tags: Sequence[Tag] = ()) -> str:
        """The grammar of any text in which calls are calls of these functions. Raises TextError where it cannot be."""
        assert self.calls is not None and self.calls.guard is not None
        return self.calls.guard(tools, tags)

    def parser(self, opened: bool, tools: Tools, hidden: Container[type[Event]] = (), one_call: bool = False) -> Parser:
        """For one output, whose prompt may have opened its reasoning; the last two arguments are Parser's."""

        def whole(source: Source) -> Steps[None]:
            if self.reasoning is not None:
                yield from reasoning(source, self.reasoning, opened)
            if self.calls is not None:
                yield from self.calls.read(source, tools)
            else:
                yield from source.content()

        return Parser(whole, hidden, one_call)


def speech(template: str, calls: str = "auto", reasoning: str = "auto") -> Speech:
    """The formats of these names; auto goes by the text of the chat template, and none is no format."""
    calls = _calls(template) if calls == "auto" else calls
    reasoning = _reasoning(template) if reasoning == "auto" else reasoning
    format = MISTRAL_ARGS if calls == "mistral" and ARGS in template else FORMATS.get(calls)
    return Speech(format, STYLES.get(reasoning))


def _calls(template: str) -> str:
    if "tools" not in template:
        return "none"
    signs = {
        BEGIN: "deepseek",
        "[TOOL_CALLS]": "mistral",
        KEY: "glm",
        FUNCTION: "qwen3_coder",
        "<tool_call>": "hermes",
        "[func_name1(": "pythonic",
        "<|python_tag|>": "llama3",
        '"parameters": dictionary of argument name': "llama3",
    }
    return next((name for sign, name in signs.items() if sign in template), "none")


def _reasoning(template: str) -> str:
    return next((name for name in ("mistral", "think") if STYLES[name].close in template), "none")
