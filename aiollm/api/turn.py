"""The assistant's message: from what its output says to OpenAI's fields, whole and piece by piece."""

import uuid
from collections.abc import Iterable
from typing import Any

from aiollm.text.parsers.formats import Format
from aiollm.text.parsers.source import Arguments, Call, Content, Event, Reasoning


class Turn:
    """One choice's message. Fields of text are to be joined, so each call's id and name come once."""

    __slots__ = ("_format", "_index")

    def __init__(self, format: Format | None) -> None:
        self._format = format
        self._index = -1  # of the latest call

    def piece(self, event: Event) -> dict[str, Any] | None:
        """The `delta` that tells an event, if it is to be told."""
        if isinstance(event, Content):
            return {"content": event.text}
        if isinstance(event, Reasoning):
            return {"reasoning": event.text, "reasoning_content": event.text}
        if isinstance(event, Arguments):
            return {"tool_calls": [{"index": self._index, "function": {"arguments": event.text}}]}
        if isinstance(event, Call):
            self._index += 1
            function = {"name": event.name, "arguments": ""}
            return {"tool_calls": [{"index": self._index, "id": self._id(), "type": "function", "function": function}]}
        return None

    def message(self, events: Iterable[Event]) -> dict[str, Any]:
        """The message of all events; content is null where there are calls and nothing else."""
        content, reasoning = [], []
        calls: list[dict[str, Any]] = []
        for event in events:
            if isinstance(event, Content):
                content.append(event.text)
            elif isinstance(event, Reasoning):
                reasoning.append(event.text)
            elif isinstance(event, Call):
                calls.append({"id": self._id(), "type": "function", "function": {"name": event.name, "arguments": ""}})
            elif isinstance(event, Arguments):
                calls[-1]["function"]["arguments"] += event.text
        message: dict[str, Any] = {"role": "assistant", "content": "".join(content) or (None if calls else "")}
        if reasoning:
            message |= dict.fromkeys(("reasoning", "reasoning_content"), "".join(reasoning))
        return message | ({"tool_calls": calls} if calls else {})

    def _id(self) -> str:
        assert self._format is not None
        return self._format.id_prefix + uuid.uuid4().hex[: self._format.id_chars]
