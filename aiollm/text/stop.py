"""Stop strings in text that comes in pieces."""

from collections.abc import Sequence

from aiollm.text.folder import TextError


class StopStrings:
    """Finds the stop string that is complete first; of several complete at the same character, the longest.

    That is what a reader of single characters would find, so the cuts of the text do not matter, and no match waits
    for a longer one. What may still become a stop string is held back, and no more: the longest end of the text that
    is a proper prefix of one. With `include` the stop string itself belongs to the output.

    Raises TextError for an empty stop string.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        if not all(stops):
            raise TextError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self._match: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may be given out, the stop string that ended it or None). After a match no text comes out."""
        if self._match is not None:
            return "", self._match
        if not self._stops:
            return text, None
        held = len(self._held)
        text = self._held + text
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop, max(0, held - len(stop) + 1))) >= 0  # it ends in what is new
        ]
        if found:
            end, start, self._match = min(found)
            self._held = ""
            return text[: end if self._include else start], self._match
        return self._hold(text), None

    def skip(self, text: str) -> str:
        """What may be given out behind text in which no stop string ends; one that begins in it may end later."""
        return self._hold(self._held + text)

    def finish(self) -> str:
        """What was held back: at the end of the text it is no stop string."""
        held, self._held = self._held, ""
        return held

    def _hold(self, text: str) -> str:
        cut = partial_start(text, self._stops)
        self._held = text[cut:]
        return text[:cut]


def partial_start(text: str, marks: Sequence[str]) -> int:
    """Where the longest end of `text` that is a proper prefix of one of `marks` begins: len(text) if none is."""
    place = len(text)
    for mark in marks:
        start = text.find(mark[0], max(0, len(text) - len(mark) + 1), place)
        while start >= 0 and not mark.startswith(text[start:]):
            start = text.find(mark[0], start + 1, place)
        place = start if start >= 0 else place
    return place
