"""Text as it comes, for parsers that are written as if all of it were there.

A parser is a generator over a Source: it yields events, and None where it must see more text before it can go on. What
it decides follows from the text alone, never from where the text was cut.

Text that was read is *held* until it is given out in an event, or dropped because it is syntax. What is still held when
a format finds that something is no call is text like any other: so nothing is lost, and nothing comes twice.
"""

import re
from collections.abc import Callable, Container, Generator, Sequence
from typing import NamedTuple, TypeVar

from aiollm.text.stop import partial_start

SPACE = re.compile(r"[ \t\r\n]+")


class Reasoning(NamedTuple):
    """A piece of what the model thought before it answered."""

    text: str


class Content(NamedTuple):
    """A piece of the answer."""

    text: str


class Call(NamedTuple):
    """A call of a function begins; its arguments follow."""

    name: str


class Arguments(NamedTuple):
    """A piece of the arguments of the latest call: JSON text."""

    text: str


class End(NamedTuple):
    """The arguments of the latest call are complete."""


Event = Reasoning | Content | Call | Arguments | End
T = TypeVar("T")
Steps = Generator[Event | None, None, T]


class Source:
    """The text of one output."""

    __slots__ = ("_at", "_ended", "_text", "held")

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self.held: list[str] = []

    def add(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """Nothing follows."""
        self._ended = True

    def drop(self) -> None:
        """What is held was syntax."""
        self.held.clear()

    def release(self) -> str:
        """What is held, to be given out."""
        text = "".join(self.held)
        self.held.clear()
        return text

    def read(self, count: int) -> str:
        """The next characters, of which the caller knows that they are there."""
        text = self._text[self._at : self._at + count]
        self._at += len(text)
        self.held.append(text)
        return text

    def peek(self) -> Steps[str]:
        """The next character; empty at the end."""
        while self._at == len(self._text) and not self._ended:
            yield None
        return self._text[self._at : self._at + 1]

    def piece(self, pattern: re.Pattern[str]) -> str:
        """What has come so far of a run of characters; `pattern` is a class of them with a +."""
        match = pattern.match(self._text, self._at)
        return self.read(len(match[0])) if match else ""

    def run(self, pattern: re.Pattern[str]) -> Steps[str]:
        """A whole run of characters, possibly empty."""
        parts = []
        while (yield from self.peek()) and (part := self.piece(pattern)):
            parts.append(part)
        return "".join(parts)

    def starts(self, *marks: str) -> Steps[str]:
        """Read the mark that comes next, if one of them does; none may begin with another."""
        longest = max(map(len, marks))
        while True:
            next_ = self._text[self._at : self._at + longest]
            for mark in marks:
                if next_.startswith(mark):
                    return self.read(len(mark))
            if self._ended or not any(mark.startswith(next_) for mark in marks):
                return ""
            yield None

    def until(self, marks: Sequence[str], give: Callable[[str], Event] | None) -> Steps[str]:
        """Give out text up to the first of `marks`, which is read and returned; empty at the end of the text.

        Without `give` the text is held. A mark may lie within another at its end only.
        """
        while True:
            rest = self._text[self._at :]
            found = [(place, mark) for mark in marks if (place := rest.find(mark)) >= 0]
            place, mark = min(found) if found else (partial_start(rest, marks), "")
            if place := len(rest) if self._ended and not found else place:
                text = self.read(place)
                if give is not None:
                    self.held.pop()
                    yield give(text)
            if mark:
                return self.read(len(mark))
            if self._ended:
                return ""
            yield None

    def content(self, *marks: str) -> Steps[str]:
        """As `until`, for the answer's text; what is held belongs to it."""
        if self.held:
            yield Content(self.release())
        return (yield from self.until(marks, Content))


class Parser:
    """Events of one output, however its text is cut.

    White space next to reasoning and calls belongs to neither them nor the content; elsewhere it is content.
    """

    __slots__ = (
        "_source", "_steps", "_hidden", "one_call", "_events", "_pieces", "_kind", "_fresh", "_space", "calls",
        "open",
    )  # fmt: skip

    def __init__(
        self, format: Callable[[Source], Steps[None]], hidden: Container[type[Event]] = (), one_call: bool = False
    ) -> None:
        """`hidden` are kinds of text that are left out; with `one_call` nothing follows the first call."""
        self._source = Source()
        self._hidden, self.one_call = hidden, one_call
        self.calls = 0
        self.open = False
        """Whether the latest call's arguments are not complete."""
        self._steps = format(self._source)
        self._events: list[Event] = []
        self._pieces: list[str] = []  # of the text of the latest event
        self._kind: type[Event] | None = None
        self._fresh = False  # whether the text of this kind has not begun, so that white space is left out
        self._space = ""  # held back: it may be the last of its kind

    @property
    def done(self) -> bool:
        """Whether nothing that follows says anything."""
        return self.one_call and self.calls > 0 and not self.open

    def push(self, text: str) -> list[Event]:
        """What the text completes; neighbouring pieces of one kind are one event."""
        self._source.add(text)
        return self._advance()

    def finish(self) -> list[Event]:
        """The rest, at the end of the text."""
        self._source.end()
        events = self._advance()
        if self._source.held:
            self._take(Content(self._source.release()))
        if self._space and self._kind is Content and Content not in self._hidden:
            self._give(Content(self._space))
            self._space = ""
        self._join()
        return events

    def _advance(self) -> list[Event]:
        self._events, self._pieces = [], []
        for event in self._steps:
            if event is None:
                break
            self._take(event)
        self._join()
        return self._events

    def _take(self, event: Event) -> None:
        if self.done:
            return
        kind = type(event)
        if kind is not self._kind:
            self._fresh, self._space = kind is Reasoning or self._kind is not None, ""
            self._kind = kind
        if isinstance(event, Reasoning | Content):
            text = event.text.lstrip(" \t\r\n") if self._fresh else self._space + event.text
            if text:
                shown = text.rstrip(" \t\r\n")
                self._fresh, self._space = False, text[len(shown) :]
                if shown and kind not in self._hidden:
                    self._give(type(event)(shown))
            return
        self.calls += kind is Call
        self.open = kind is not End
        self._give(event)

    def _give(self, event: Event) -> None:
        if isinstance(event, Reasoning | Content | Arguments):
            if self._events and type(self._events[-1]) is type(event):
                self._pieces.append(event.text)
                return
            self._join()
            self._pieces = [event.text]
        else:
            self._join()
            self._pieces = []
        self._events.append(event)

    def _join(self) -> None:
        """The text of the latest event is whole. Joined piece by piece, 80 KB of short ones took half a second."""
        if len(self._pieces) > 1:
            last = self._events[-1]
            assert not isinstance(last, Call | End)
            self._pieces = ["".join(self._pieces)]
            self._events[-1] = type(last)(self._pieces[0])
