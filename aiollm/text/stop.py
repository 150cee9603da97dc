"""Stop strings in text that comes in pieces."""

from collections.abc import Sequence

from aiollm.text.folder import TextError


class StopStrings:
    """Finds the stop string that is complete first; of several complete at the same character, the longest.

    That is what a reader of single characters would find, so the cuts of the text do not matter, and no match waits
    for a longer one. What may still become a stop string is held back, and no more: the longest end of the text that
    is a proper prefix of one. With `include` the stop string itself belongs to the output.

    The time is linear in the text for each stop string, however they look. Raises TextError for an empty one.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        if not all(stops):
            raise TextError("a stop string must not be empty")
        self._stops = [_Stop(stop) for stop in stops]
        self._firsts = frozenset(stop[0] for stop in stops)
        self._include = include
        self._held = ""
        self._match: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may be given out, the stop string that ended it or None). After a match no text comes out."""
        if self._match is not None:
            return "", self._match
        if not self._held and self._firsts.isdisjoint(text):
            return text, None  # most tokens
        held, found = len(self._held), []
        for stop in self._stops:
            end = stop.read(text)
            if end >= 0:
                found.append((held + end, held + end - len(stop.string), stop.string))
        if found:
            end, start, self._match = min(found)
            text, self._held = self._held + text, ""
            return text[: end if self._include else start], self._match
        return self._hold(text), None

    def skip(self, text: str) -> str:
        """What may be given out behind text in which no stop string ends; one that begins in it may end later."""
        for stop in self._stops:
            end = 0
            while end >= 0:
                end = stop.read(text, end)
        return self._hold(text)

    def finish(self) -> str:
        """What was held back: at the end of the text it is no stop string."""
        held, self._held = self._held, ""
        return held

    def _hold(self, text: str) -> str:
        text = self._held + text
        cut = len(text) - max([stop.begun for stop in self._stops], default=0)
        self._held = text[cut:]
        return text[:cut]


class _Stop:
    """One stop string, of which the text so far ends with the first `begun` characters (Knuth, Morris and Pratt, 1977).

    The first k characters end with the first `borders[k]`, and with no more that are fewer than k. Where the next
    character is not that at k, `leaps[k]` may go on: the longest border that is not followed by the one at k as well;
    -1 is none. Both grow with what was read: long strings of which nothing comes cost nothing.
    """

    __slots__ = ("string", "begun", "_borders", "_leaps")

    def __init__(self, string: str) -> None:
        self.string = string
        self.begun = 0
        self._borders, self._leaps = [-1], [-1]

    def read(self, text: str, start: int = 0) -> int:
        """Where the string is complete first in the text from `start` on, which is read so far; -1 where it is not."""
        string, leaps, begun, at = self.string, self._leaps, self.begun, start
        while at < len(text):
            if begun:
                while begun >= 0 and string[begun] != text[at]:
                    begun = leaps[begun]
            elif (at := text.find(string[0], at)) < 0:
                break
            at, begun = at + 1, begun + 1
            if begun == len(self._borders):
                self._grow()
            if begun == len(string):
                self.begun = self._borders[begun]
                return at
        self.begun = begun
        return -1

    def _grow(self) -> None:
        """The next border and leap."""
        string, leaps, count = self.string, self._leaps, len(self._borders)
        border = self._borders[-1]
        while border >= 0 and string[border] != string[count - 1]:
            border = leaps[border]
        border += 1
        self._borders.append(border)
        if count < len(string):
            leaps.append(border if string[count] != string[border] else leaps[border])


def partial_start(text: str, marks: Sequence[str]) -> int:
    """Where the longest end of `text` that is a proper prefix of one of `marks` begins: len(text) if none is."""
    place = len(text)
    for mark in marks:
        start = text.find(mark[0], max(0, len(text) - len(mark) + 1), place)
        while start >= 0 and not mark.startswith(text[start:]):
            start = text.find(mark[0], start + 1, place)
        place = start if start >= 0 else place
    return place
