"""The output of one choice: ids become text, stop strings cut it, logprobs go with the text they belong to.

Positions are counted in characters of the choice's text, the echoed prompt included:

    [0, released)        given out, or waiting for the handler to take it
    [released, decoded)  held back: it may become a stop string

Where nothing wants the text at once, as stop strings and logprobs do, ids wait until somebody takes the text.
"""

import time
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from aiollm.engine.request import NOBODY, Finish, PromptToken, Request, Token
from aiollm.text.detokenizer import TAIL_IDS, Detokenizer
from aiollm.text.parsers.source import Event, Parser
from aiollm.text.stop import StopStrings
from aiollm.text.tokenizer import Tokenizer
from aiollm.wire.sampling import SamplingParams


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A token of the text: its logprob (None for the first of a prompt) and the character where its text begins."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    start: int


class Delta(msgspec.Struct, frozen=True):
    """What a choice gives out at once. A character's entries come together with its last byte's."""

    text: str
    entries: Sequence[Entry] = ()
    events: Sequence[Event] | None = None
    """What the text says, where the output has a parser: calls, reasoning, content."""


class Output(NamedTuple):
    """How a choice's output is wanted."""

    stops: Sequence[str] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    keep_entries: bool = False
    """Whether the logprobs of tokens are wanted beside the text."""
    echo: bool = False
    """Whether the choice begins with the prompt."""
    echo_text: str | None = None
    """The prompt's text, where it did not come as ids."""
    echo_lead: int | None = None
    """Characters of special tokens before it that were added; its own are shown. None where its text is the ids'."""
    discard: bool = False
    """Drop what is generated: only the echo is wanted."""
    stop_groups: Sequence[tuple[int, ...]] = ()
    """Sequences of token ids that end the output, and belong to it."""
    print_eos: bool = False
    """Whether the end-of-sequence token belongs to the text, as far as special tokens do."""
    cut: Sequence[int] = ()
    """Ids cut off the end of the prompt: what is generated says the same text once more, and it is left out."""
    end_entry: bool = False
    """Whether tokens that end the output, an id or those of a stop string, have entries even where the text lacks them.
    """
    parser: Callable[[], Parser] | None = None
    """Makes what tells calls and reasoning from content."""
    shown: frozenset[int] = frozenset()
    """Special tokens that a parser has to see."""


class Choice:
    """The sink of one request (engine.request.Sink).

    Slots here, in Stream, Pulse and Detokenizer keep what a token needs closer together: 21.1 -> 19.6 us a token at
    1,024 streams.
    """

    __slots__ = (
        "index", "request", "generated", "finish", "first", "last", "gaps", "_output", "_detokenizer", "_stops",
        "_tokenizer", "_echoes", "_text", "_entries", "_shown", "_read", "_waits", "_released", "_decoded", "on_text",
        "on_end", "_inter_token", "prompt_scores", "_logprobs", "_parser", "_eager", "_events", "_unsaid", "_untold",
        "_unhealed", "_healed",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        request_id: str,
        prompt: NDArray[np.int64],
        sampling: SamplingParams,
        tokenizer: Tokenizer,
        output: Output,
        *,
        namespace: str,
        arrived: float,
        on_text: Callable[[], None],
        on_end: Callable[[], None],
        inter_token: Callable[[float], None],
        kind: Hashable = None,
        priority: int = 0,
        key: str = "",
        patience: float | None = None,
        twin: "Choice | None" = None,
        ignores_eos: bool = False,
    ) -> None:
        """`on_text` and `on_end` wake whoever takes the output; `inter_token` is told seconds between tokens. The four
        before `twin` are those of the request; with a `twin` it is that one's, and no other. With
        `ignores_eos` every id that ends it is one that the client has named."""
        self.index = index
        eos_ids = frozenset[int]() if ignores_eos else tokenizer.eos_ids
        endless = not (sampling.stop_ids or output.stops or output.stop_groups)
        self.request: Request = twin.request if twin is not None else Request(
            request_id, prompt, sampling, self, arrived, namespace, eos_ids, kind=kind,
            certain=endless or sampling.min_tokens >= sampling.max_tokens, priority=priority, key=key,
            patience=patience,
        )  # fmt: skip
        self.generated = 0
        self.finish: Finish | None = None
        self.first: float | None = None
        self.last = arrived
        self.gaps = array("f")
        """Seconds between its tokens."""
        self._output = output
        self.on_text, self.on_end, self._inter_token = on_text, on_end, inter_token
        tail = prompt[-TAIL_IDS:].tolist()
        self._detokenizer: Detokenizer | _Healed = _detokenizer(tokenizer, tail, output)
        if output.cut:
            self._detokenizer = _Healed(self._detokenizer, len(_detokenizer(tokenizer, tail, output).push(output.cut)))
        self._unhealed = sum(len(tokenizer.token_bytes(id)) for id in output.cut)
        """Bytes of what was cut off that are not generated again yet."""
        self._healed = 0  # ids that say nothing else
        self._stops = StopStrings(output.stops, output.include_stop) if output.stops else None
        self._parser = output.parser() if output.parser is not None else None
        self._eager = self._parser if self._parser is not None and self._parser.one_call else None
        """It reads each text at once, since what it reads may end the output."""
        self._events: list[Event] = []  # those of it that nobody has taken
        self._waits = not (
            output.stops or output.stop_groups or output.keep_entries or output.discard or self._eager is not None
        )
        self._shown = 0  # generated ids whose text belongs to the output: all, or all but the last
        self._read = 0  # and of those the ones that the detokenizer has read
        self._text: list[str] = []
        self._entries: deque[Entry] = deque()
        self._released = self._decoded = 0
        self.prompt_scores: list[PromptToken] = []
        self._tokenizer = tokenizer
        self._echoes = output.echo and sampling.prompt_logprobs >= 0  # until the prompt's entries are given out
        self._logprobs = 0.0  # the sum of those of tokens, where they are looked at
        self._unsaid: list[Entry] = []  # of text that the parser holds back
        self._untold = ""  # that text
        if output.echo:
            self._give(output.echo_text if output.echo_text is not None else self._prompt_text())
            self._decoded = self._released

    @property
    def ids(self) -> list[int]:
        """Every id generated for the client, those included that end the output."""
        return self.request.output[: self.generated]

    @property
    def mean_logprob(self) -> float:
        """Of the generated tokens, where entries are kept."""
        return self._logprobs / max(1, self.generated)

    @property
    def reason(self) -> str:
        """Why it ended, as clients are told: with calls, unless the last of them was cut off."""
        assert self.finish is not None
        if self._parser is None or not self._parser.calls or self._parser.open:
            return self.finish.reason
        return "tool_calls"

    def token(self, token: Token) -> int | str | None:
        """Take one generated token; the stop string, or the last id of the stop group, that it completes ends the
        request, as does, with an empty string, the last thing that its parser reads."""
        now = time.monotonic()
        if self.first is None:
            self.first = now
        else:
            self._inter_token(now - self.last)
            self.gaps.append(now - self.last)
        self.last = now
        stop: int | str | None = None
        if self._waits:
            self.generated += 1
            self._shown += not token.ends or self._shows(token.id)
        elif not self._output.discard:
            self.generated += 1
            self._logprobs += token.logprob
            if not token.ends or self._shows(token.id):
                stop = self._take_in(token)
            elif self._output.end_entry:
                self._entries.append(Entry(token.id, token.logprob, token.top, self._decoded))
            if self._eager is not None and self._eager.done and self.generated >= self.request.sampling.min_tokens:
                stop = "" if stop is None else stop
        self.on_text()
        return stop

    def prompt_tokens(self, tokens: list[PromptToken]) -> None:
        """Take logprobs of prompt tokens; they come before the first generated token."""
        self.prompt_scores += tokens

    def finished(self, finish: Finish) -> None:
        """Nothing follows: what was held back is no stop string."""
        self.last = time.monotonic()
        if not isinstance(finish.stop, str) and finish.reason in ("stop", "length"):
            text = self._waiting() + self._detokenizer.finish()
            self._give(self._stops.push(text)[0] + self._stops.finish() if self._stops is not None else text)
            self._released = self._decoded + 1  # every entry goes out
        elif self._output.end_entry and not self._output.echo:  # of an echo the text counts
            self._released = self._decoded + 1  # those of the stop string too: the ids are told
        self.finish = finish._replace(stop=None) if finish.stop == "" else finish
        self.leave()
        self.on_end()

    def leave(self) -> None:
        """The request gives it up: as long as each holds the other, only the garbage collector frees them."""
        self.request.sink = NOBODY

    def take(self) -> Delta | None:
        """What may be given out since the last call; None where there is nothing, or no token came yet."""
        if self.first is None and self.finish is None:
            return None
        text = self._waiting()
        if self._text:
            text = "".join(self._text) + text
            self._text.clear()
        if self._echoes:
            self._echoes = False
            self._entries.extendleft(reversed(self._prompt_entries()))
        if not self._entries and self._parser is None:
            return Delta(text) if text else None
        entries = []
        while self._entries and self._entries[0].start < self._released:
            entries.append(self._entries.popleft())
        if self._parser is not None:
            return self._said(self._parser, text, entries)
        return Delta(text, entries) if text or entries else None

    def _said(self, parser: Parser, text: str, entries: list[Entry]) -> Delta | None:
        """Text that the parser holds back comes, with its entries, with the next that it does not, or at the end."""
        events, self._events = self._events, []
        if text and self._eager is None:
            events = parser.push(text)
        if self.finish is not None:
            events += parser.finish()
        self._unsaid += entries
        self._untold += text
        if not events and (self.finish is None or not (self._unsaid or self._untold)):
            return None
        entries, self._unsaid = self._unsaid, []
        text, self._untold = self._untold, ""
        return Delta(text, entries, events)

    def _waiting(self) -> str:
        """The text of ids that nobody has read so far."""
        if self._read == self._shown:
            return ""
        ids = self.request.output[self._read : self._shown]
        self._read = self._shown
        return self._detokenizer.push(ids)

    def _shows(self, id: int) -> bool:
        """Whether the token that ends the output belongs to it."""
        return self._output.print_eos if id in self.request.eos_ids else self._output.include_stop

    def _take_in(self, token: Token) -> int | str | None:
        if self._output.keep_entries:
            self._entries.append(Entry(token.id, token.logprob, token.top, self._decoded))
        text = self._detokenizer.push((token.id,))
        self._decoded += len(text)
        if self._unhealed:
            left = self._unhealed - len(self._tokenizer.token_bytes(token.id))
            self._unhealed = max(0, left)
            self._healed += left >= 0
        if self.generated <= self.request.sampling.min_tokens:
            self._give(text if self._stops is None else self._stops.skip(text))
            return None
        stop: int | str | None = None
        if self._stops is not None:
            text, stop = self._stops.push(text)
        if text:
            self._give(text)
        return stop if stop is not None or not self._output.stop_groups else self._stop_group()

    def _stop_group(self) -> int | None:
        """The last id of a stop group that the generated ids, behind those that heal the prompt, end with."""
        for group in self._output.stop_groups:
            if len(group) <= self.generated - self._healed and tuple(self.request.output[-len(group) :]) == group:
                return group[-1]
        return None

    def _give(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._released += len(text)
            if self._eager is not None:
                self._events += self._eager.push(text)

    def _prompt_text(self) -> str:
        """A character that the prompt leaves unfinished belongs to the generated text, if there is any."""
        whole = _detokenizer(self._tokenizer, (), self._output)
        text = whole.push(self.request.prompt.tolist())
        return text + whole.finish() if self._output.discard else text

    def _prompt_entries(self) -> list[Entry]:
        """Those of the echo. They take some microseconds each, so a document makes them where it is made itself."""
        output = self._output
        shown = output if output.echo_lead is None else output._replace(skip_special_tokens=False)
        text = _detokenizer(self._tokenizer, (), shown)
        decoded = -(output.echo_lead or 0)
        entries: list[Entry] = []
        for id, score in zip(self.request.prompt.tolist(), (None, *self.prompt_scores), strict=True):
            logprob, top = (None, ()) if score is None else (score.logprob, score.top)
            entries.append(Entry(id, logprob, top, max(0, decoded)))
            decoded += len(text.push((id,)))
        return entries


class Twins:
    """The sink of a request that is computed once for several choices."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        self._choices = choices

    def token(self, token: Token) -> int | str | None:
        (stop,) = {choice.token(token) for choice in self._choices}
        return stop

    def prompt_tokens(self, tokens: list[PromptToken]) -> None:
        for choice in self._choices:
            choice.prompt_tokens(tokens)

    def finished(self, finish: Finish) -> None:
        for choice in self._choices:
            choice.finished(finish)


class _Healed:
    """A detokenizer that leaves out the first characters."""

    def __init__(self, detokenizer: Detokenizer, left: int) -> None:
        self._detokenizer = detokenizer
        self._left = left

    def push(self, ids: Sequence[int]) -> str:
        return self._rest(self._detokenizer.push(ids))

    def finish(self) -> str:
        return self._rest(self._detokenizer.finish())

    def _rest(self, text: str) -> str:
        rest = text[self._left :]
        self._left -= len(text) - len(rest)
        return rest


def _detokenizer(tokenizer: Tokenizer, tail: Sequence[int], output: Output) -> Detokenizer:
    spaces = output.spaces_between_special_tokens
    return Detokenizer(tokenizer, tail, output.skip_special_tokens, spaces, output.shown)
