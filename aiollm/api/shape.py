"""The form of an endpoint's answers, and the constant bytes of a stream."""

from typing import Any, Protocol

import msgspec

from aiollm.api.choice import Choice, Delta
from aiollm.api.generation import Generation, Usage

DONE = b"data: [DONE]\n\n"
END = b"]}\n\n"


class Shape(Protocol):
    """The form of one endpoint's answers."""

    done: bytes
    """Ends a stream."""

    def opening(self) -> bytes:
        """Events that come before any token."""

    def delta(self, choice: Choice, delta: Delta, usage: Usage | None) -> bytes:
        """The event for a piece of a choice."""

    def closing(self, choice: Choice, delta: Delta | None, usage: Usage | None) -> bytes:
        """The events for the last piece, if there is one, and the end of a choice."""

    def usage(self, usage: Usage) -> bytes:
        """The event that ends the stream's JSON."""

    def whole(self) -> dict[str, Any]:
        """The document for a generation that is complete."""


class Unstreamed:
    """What a Shape lacks whose endpoint does not stream."""

    done = b""

    def opening(self) -> bytes:
        return b""

    def delta(self, choice: Choice, delta: Delta, usage: Usage | None) -> bytes:
        return b""

    def closing(self, choice: Choice, delta: Delta | None, usage: Usage | None) -> bytes:
        return b""

    def usage(self, usage: Usage) -> bytes:
        return b""


class Template:
    """The constant bytes of a stream's events, encoded once; only choices are encoded again and again."""

    def __init__(self, generation: Generation, kind: str) -> None:
        self.fields = {
            "id": generation.id, "object": kind, "created": generation.created, "model": generation.model,
        }  # fmt: skip
        self.head = b"data: " + msgspec.json.encode(self.fields)[:-1] + b',"choices":['
        """How every event begins; END is how one without more fields ends."""

    def event(self, choice: bytes, usage: Usage | None = None, more: bytes = b"") -> bytes:
        """One event; `more` are encoded fields with a comma before each."""
        if usage is not None:
            more += b',"usage":' + msgspec.json.encode(usage)
        return b"".join((self.head, choice, b"]", more, b"}\n\n"))
