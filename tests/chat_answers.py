"""A chat answered whole and streamed, by a worker that says what a test wants."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from stand import Runner
from tiny_tokenizer import CHATML

PATH = "/v1/chat/completions"
TEMPLATE = (
    "{# <tool_call> </think> #}{% for tool in tools or () %}{{ tool.function.name }} {% endfor %}"
    + CHATML
    + "{% if opening %}{{ opening }}{% endif %}"
)


@contextlib.contextmanager
def constraints(served: Runner) -> Iterator[list[Any]]:
    """Those of each request that comes to the engine inside of the block."""
    seen: list[Any] = []
    submit = served.stand.engine.submit

    def watched(*requests: Any) -> None:
        seen.extend(request.sampling.constraints for request in requests)
        submit(*requests)

    served.stand.engine.submit = watched  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        served.stand.engine.submit = submit  # type: ignore[method-assign]


async def both(served: Runner, body: dict[str, Any], *texts: str) -> tuple[dict[str, Any], list[Any]]:
    """The answer, and the chunks of the same answer streamed."""
    served.stand.workers.say(*texts)
    status, answer = await served.stand.post(PATH, body)
    assert status == 200, answer
    parts = (await served.stand.events(PATH, body)).decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return answer, [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def joined(chunks: list[Any], index: int = 0) -> dict[str, Any]:
    """The choice that a client puts together, after checking the order in which its pieces came."""
    message: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    reason, logprobs = None, []
    for choice in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index):
        assert reason is None, "nothing follows the finish reason"
        delta, reason = choice["delta"], choice["finish_reason"]
        assert ("role" in delta) == (not message)
        message.setdefault("role", delta.get("role"))
        logprobs += choice["logprobs"]["content"] if choice["logprobs"] else []
        for name in ("content", "reasoning", "reasoning_content"):
            if name in delta:
                assert delta[name] or "role" in delta
                message[name] = message.get(name, "") + delta[name]
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(calls) and call["type"] == "function" and not call["function"]["arguments"]
                calls.append({key: call[key] for key in ("id", "type", "function")})
            else:
                assert call["index"] == len(calls) - 1 and set(call["function"]) == {"arguments"}
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
    if calls:
        message["tool_calls"] = calls
        message["content"] = message["content"] or None
    return {"message": message, "finish_reason": reason, "logprobs": logprobs}
