"""How a request wants its tokens drawn. Ranges are checked at the HTTP face; here they are facts."""

from typing import Literal

import msgspec


class Decay(msgspec.Struct, frozen=True, array_like=True):
    """k tokens after the first `start` ones a logit x of `ids` is x + |x| (factor ** k - 1): the end gets likelier."""

    start: int
    factor: float
    ids: tuple[int, ...]


class Tag(msgspec.Struct, frozen=True, array_like=True):
    """What begins or ends thoughts or calls, as text and as the ids that write it."""

    text: str
    ids: tuple[int, ...]
    special: bool
    """Whether it is one special token, which text does not contain."""


class Thoughts(msgspec.Struct, frozen=True, array_like=True):
    """What an output begins with where the prompt has `opened` it, and otherwise may begin with."""

    open: Tag
    close: Tag
    opened: bool


class Grammar(msgspec.Struct, frozen=True, tag="grammar"):
    """The output is a text of this language, from its first generated token, or from the end of its thoughts, to its
    end."""

    kind: Literal["json", "regex", "ebnf", "calls", "lark"]
    source: str
    """A JSON schema as JSON, a regular expression that the whole text matches, a client's grammar in Lark's syntax or
    llama.cpp's, one of ours for calls of tools, or for `lark` what any of them became for llguidance."""
    thoughts: Thoughts | None = None


class AllowedIds(msgspec.Struct, frozen=True, tag="allowed"):
    """Nothing but these ids is drawn."""

    ids: tuple[int, ...]


class BannedWords(msgspec.Struct, frozen=True, tag="banned"):
    """None of these sequences of ids is generated: the last id is not drawn where the others stand before it."""

    sequences: tuple[tuple[int, ...], ...]


class FirstIds(msgspec.Struct, frozen=True, tag="first"):
    """The first generated token is one of these."""

    ids: tuple[int, ...]


class ThoughtLimit(msgspec.Struct, frozen=True, tag="thoughts"):
    """Behind so many tokens of thoughts they are closed, as soon as all other constraints allow it."""

    tokens: int
    thoughts: Thoughts


class Healing(msgspec.Struct, frozen=True, tag="healing"):
    """What is generated begins with this text, which was cut off the end of the prompt."""

    text: bytes


Constraint = Grammar | AllowedIds | BannedWords | FirstIds | Healing | ThoughtLimit


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Temperature 0 is greedy. The draw at position p of a sequence is a function of (seed, p) alone."""

    max_tokens: int = 16
    min_tokens: int = 0
    """Gives way where `constraints` allow nothing but an end."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    input_penalty: bool | None = None
    """Whether the penalties count prompt tokens; None: the repetition penalty does, the others do not."""
    decay: Decay | None = None
    logit_bias: dict[int, float] = {}
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the output, the model's end-of-sequence ids among them unless they are ignored."""
    top_logprobs: int = -1
    """-1: only the drawn token's logprob travels; n >= 0: also the n likeliest tokens of each position."""
    prompt_logprobs: int = -1
    """-1: none; n >= 0: the logprob of every prompt token but the first, and the n likeliest of each position."""
    constraints: tuple[Constraint, ...] = ()
    """All of them hold; at most one of them is a grammar."""
    embed: bool = False
    """Whether the hidden state from which each token is drawn travels with it."""
