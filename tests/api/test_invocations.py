"""SageMaker's door leads to the endpoint that the fields tell of."""

from typing import Any

import pytest
from stand import Runner


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, "chat.completion"),
        ({"prompt": "hi", "inputs": None}, "text_completion"),
    ],
)
def test_openai_s_requests_are_answered(served: Runner, body: dict[str, Any], kind: str) -> None:
    status, answer = served.run(served.stand.post("/invocations", body))
    assert (status, answer["object"]) == (200, kind)


def test_native_requests_are_answered(served: Runner) -> None:
    status, answer = served.run(served.stand.post("/invocations", {"inputs": "hi"}))
    assert status == 200 and answer["generated_text"] == ["hi"]


def test_a_stream_is_a_stream(served: Runner) -> None:
    events = served.run(served.stand.events("/invocations", {"prompt": "hi"}))
    assert events.endswith(b"data: [DONE]\n\n") and b'"text_completion"' in events


@pytest.mark.parametrize(
    ("body", "code"), [({}, "missing_field"), ({"prompt": None}, "missing_field"), ([], "invalid_json")]
)
def test_a_body_that_tells_nothing_is_refused(served: Runner, body: Any, code: str) -> None:
    status, answer = served.run(served.stand.post("/invocations", body))
    assert (status, answer["error"]["code"]) == (400, code)


def test_a_field_at_fault_is_named_by_the_endpoint(served: Runner) -> None:
    status, answer = served.run(served.stand.post("/invocations", {"prompt": "hi", "temperature": 3}))
    assert (status, answer["error"]["param"]) == (400, "temperature")
