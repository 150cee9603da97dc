"""A request as the core sees it, and the sink through which its tokens leave."""

import enum
from collections.abc import Hashable
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from aiollm.wire.sampling import SamplingParams


class Token(msgspec.Struct, frozen=True, gc=False):
    """One drawn token. `top` holds (id, logprob) of the likeliest tokens, likeliest first.

    A Struct is made in a third of the time of a NamedTuple, and there are as many as tokens.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    ends: bool
    """The id itself ends the output and is no part of the text."""


class PromptToken(NamedTuple):
    """A prompt token as the model saw it coming; the first prompt token has none."""

    position: int
    logprob: float
    rank: int
    """How many tokens are at least as likely, itself included."""
    top: tuple[tuple[int, float], ...]


class Finish(NamedTuple):
    """Why a request ended: reason is stop, length, abort, timeout (it never began), constraints (they left no token to
    draw), numerical_error (logits that are not finite) or error.

    `stop` is the stop string or the id of the stop token that ended it (None for the end of sequence).
    """

    reason: str
    stop: int | str | None = None
    error: str = ""


class Sink(Protocol):
    """Where a request's output goes. Called on the event loop, in token order; must not block."""

    def token(self, token: Token) -> int | str | None:
        """Take one token; a stop string that the text now contains ends the request, or the last id of a sequence, or
        an empty string where the output is complete."""

    def prompt_tokens(self, tokens: list[PromptToken]) -> None:
        """Take logprobs of prompt tokens, in order."""

    def finished(self, finish: Finish) -> None:
        """Nothing follows."""


class Nobody:
    """The sink of a request that is over: it and the one that it had are free of each other."""

    def token(self, token: Token) -> int | str | None:
        raise RuntimeError("the request is over")

    def prompt_tokens(self, tokens: list[PromptToken]) -> None:
        raise RuntimeError("the request is over")

    def finished(self, finish: Finish) -> None:
        raise RuntimeError("the request is over")


NOBODY = Nobody()


class State(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Request:
    """`output` grows as tokens are judged; a paused request waits again with its prompt and all of its output."""

    __slots__ = (
        "id", "prompt", "sampling", "sink", "arrived", "namespace", "eos_ids", "output", "state", "row",
        "deaths", "pauses", "cached_tokens", "prompt_seen", "admitted", "kind", "certain", "priority", "key",
        "patience", "group", "serial", "hidden",
    )  # fmt: skip

    def __init__(
        self,
        id: str,
        prompt: NDArray[np.int64],
        sampling: SamplingParams,
        sink: Sink,
        arrived: float = 0.0,
        namespace: str = "",
        eos_ids: frozenset[int] = frozenset(),
        *,
        kind: Hashable = None,
        certain: bool = False,
        priority: int = 0,
        key: str = "",
        patience: float | None = None,
    ) -> None:
        self.id = id
        self.prompt = prompt
        self.sampling = sampling
        self.sink = sink
        self.arrived = arrived
        self.namespace = namespace
        self.eos_ids = eos_ids
        """Those of sampling.stop_ids that are the model's own: they end a request without being its stop reason."""
        self.output: list[int] = []
        self.state = State.WAITING
        self.row = -1
        self.deaths = 0
        self.pauses = 0
        self.cached_tokens = 0
        """Prompt tokens taken from the prefix cache at first admission."""
        self.prompt_seen = 1
        """Prompt positions whose logprobs were delivered; position 0 has none."""
        self.admitted: float | None = None
        self.kind = kind
        """Requests of one kind have outputs of similar lengths."""
        self.certain = certain
        """Nothing but max_tokens ends the output."""
        self.priority = priority
        """Smaller is sooner."""
        self.key = key
        """Whose request it is: what one key asks for must not hold up the others."""
        self.patience = patience
        """Seconds from arrival within which it must begin; None where the client named none."""
        self.serial = -1
        """Place among those that arrived at the same time; the queue gives it."""
        self.hidden: NDArray[np.float32] | None = None
        """The hidden state from which the last token was drawn, where the sampling asks for it."""
        self.group: tuple[Request, ...] = ()
        """Choices of one prompt, which begin together."""

    @property
    def known(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def limit(self) -> int:
        """Total length at which the request ends."""
        return len(self.prompt) + self.sampling.max_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.sampling.prompt_logprobs >= 0 and self.prompt_seen < len(self.prompt)

    def tokens(self) -> NDArray[np.int64]:
        """Prompt and output as known now."""
        return np.concatenate([self.prompt, np.asarray(self.output, np.int64)])
