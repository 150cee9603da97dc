"""What a model thinks before it answers: whether it may in this request, and how much."""

from collections.abc import Mapping, Sequence
from typing import Any

from aiollm.api.errors import invalid
from aiollm.api.messages import text_of
from aiollm.api.parts import Parts
from aiollm.api.schema import ChatRequest
from aiollm.wire.sampling import AllowedIds, BannedWords, Constraint, ThoughtLimit, Thoughts

END_CHARS = 64  # of a prompt, which tell whether it leaves the model thinking
SWITCHES = ("enable_thinking", "thinking")  # variables of templates


def opened(parts: Parts, request: ChatRequest, prompt: str) -> bool | None:
    """Whether the prompt leaves the model thinking; None where the output has no thoughts that are known as such."""
    style = parts.speech.reasoning
    if style is None:
        return None
    kwargs: Mapping[str, Any] = request.chat_template_kwargs or {}
    wanted = all(kwargs.get(name) is not False for name in SWITCHES)
    return style.opened_by(prompt[-END_CHARS:], _continued(request), wanted)


def begins(parts: Parts, opened: bool | None) -> Thoughts | None:
    """What a grammar has to let the output begin with."""
    style = parts.speech.reasoning
    if style is None or opened is None:
        return None
    return Thoughts(parts.tokenizer.tag(style.open), parts.tokenizer.tag(style.close), opened)


def limits(
    parts: Parts, request: ChatRequest, opened: bool | None, others: Sequence[Constraint]
) -> tuple[ThoughtLimit, ...]:
    """The limit that the request sets to its thoughts. Raises ApiError where nobody could see that they are there, and
    where its `others` would not let them be closed."""
    name, budget = "thinking_token_budget", request.thinking_token_budget
    if budget is None or budget < 0:
        return ()
    if parts.speech.reasoning is None:
        message = f"{name}: how this model writes what it thinks is not known here; see --reasoning_parser"
        raise invalid(name, message, "unsupported_field")
    if parts.tokenizer.pieces is None:
        raise invalid(name, f"{name}: the tokens of this model have no text of their own", "unsupported_field")
    thoughts = begins(parts, opened)
    if thoughts is None:
        return ()
    _check_closes(thoughts.close.ids, others)
    return (ThoughtLimit(budget, thoughts),)


def _check_closes(tag: tuple[int, ...], others: Sequence[Constraint]) -> None:
    """Raises ApiError where one of `others` forbids the closing tag."""
    for other in others:
        if isinstance(other, AllowedIds) and not set(tag) <= set(other.ids):
            raise invalid("allowed_token_ids", "allowed_token_ids: they lack an id of the tag that closes thoughts")
        if isinstance(other, BannedWords) and any(_holds(tag, banned) for banned in other.sequences):
            raise invalid("bad_words", "bad_words: one of them is in the tag that closes thoughts")


def _holds(ids: tuple[int, ...], run: tuple[int, ...]) -> bool:
    return any(ids[at : at + len(run)] == run for at in range(len(ids)))


def _continued(request: ChatRequest) -> str:
    """The text of the message that the model goes on with."""
    if request.continue_final_message is not True:
        return ""
    content = request.messages[-1].content or ""
    return content if isinstance(content, str) else "".join(text_of(part) or "" for part in content)
