"""The document describes every route, and the server answers as it says."""

import asyncio
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz import fuzzed
from stand import Runner, stand

from aiollm import __version__
from aiollm.api import status
from aiollm.api.app import ROUTES
from aiollm.api.caller import TIMEOUT
from aiollm.api.openapi import doc, document, plain
from aiollm.api.static import PAGE

OPEN = (status.health, status.ready, PAGE["/"])
MADE = document(ROUTES, OPEN, locked=True)


def schema(name: str) -> dict[str, Any]:
    found: dict[str, Any] = MADE["components"]["schemas"][name]
    return found


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from references(item)


def test_the_server_serves_it(served: Runner) -> None:
    async def main() -> Any:
        async with served.stand.session.get(served.stand.url + "/openapi.json") as response:
            assert (response.status, response.content_type) == (200, "application/json")
            return await response.json()

    answer = served.run(main())
    assert answer["openapi"] == "3.1.0" and answer["info"]["version"] == __version__
    assert answer["paths"].keys() == {plain(path) for path in ROUTES["GET"] | ROUTES["POST"]}
    assert answer["security"] == []


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_every_route_is_there_with_a_line_answers_and_errors(method: str) -> None:
    for path, handler in ROUTES[method].items():
        operation = MADE["paths"][plain(path)][method.lower()]
        assert operation["summary"] == doc(handler).text != "", path
        assert {"200", "401", "503"} <= operation["responses"].keys()
        assert {parameter["name"] for parameter in operation["parameters"]} >= set(
            plain(path).split("{")[1:2] and ["id"]
        )
        if doc(handler).requests and method == "POST":
            assert operation["requestBody"]["content"]["application/json"]["schema"]
            assert {"400", "404", "413", "415", "429", "500"} <= operation["responses"].keys()


def test_keys_are_asked_for_everywhere_but_at_the_probes() -> None:
    assert MADE["security"] == [{"bearer": []}, {"header": []}]
    free = {path for path, methods in MADE["paths"].items() if methods.get("get", {}).get("security") == []}
    assert free == {path for path, handler in ROUTES["GET"].items() if handler in OPEN}


def test_everything_that_is_referred_to_is_there() -> None:
    found = set(references(MADE))
    assert len(found) > 10
    for reference in found:
        place: Any = MADE
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]
        assert place


def test_fields_have_their_ranges_and_a_line() -> None:
    fields = schema("ChatRequest")["properties"]
    number = next(kind for kind in fields["temperature"]["anyOf"] if kind["type"] == "number")
    assert (number["minimum"], number["maximum"]) == (0, 2)
    assert "likeliest" in fields["temperature"]["description"]
    assert schema("ChatRequest")["required"] == ["messages"]


@pytest.mark.parametrize(
    ("kind", "field", "least"),
    [
        ("ChatRequest", "max_tokens", 0), ("ChatRequest", "top_logprobs", 0), ("ChatRequest", "prompt_logprobs", 0),
        ("CompletionRequest", "max_tokens", 0), ("CompletionRequest", "logprobs", 0),
    ],
)  # fmt: skip
def test_what_is_always_refused_is_not_promised(served: Runner, kind: str, field: str, least: int) -> None:
    (number,) = (each for each in schema(kind)["properties"][field]["anyOf"] if each["type"] == "integer")
    assert number["minimum"] == least
    chat = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "prompt_logprobs": 0}
    path, body = {
        "ChatRequest": ("/v1/chat/completions", chat),
        "CompletionRequest": ("/v1/completions", {"prompt": "x", "echo": True}),
    }[kind]
    for value, expected in ((least, 200), (least - 1, 400)):
        found, answer = served.run(served.stand.post(path, {"max_tokens": 1} | body | {field: value}))
        assert found == expected, answer
    assert answer["error"]["param"] == field and f">= {least}" in answer["error"]["message"]


def test_what_is_run_may_be_given_a_time_to_begin() -> None:
    told = {
        path
        for path, methods in MADE["paths"].items()
        for operation in methods.values()
        if any(parameter["name"] == TIMEOUT for parameter in operation["parameters"])
    }
    assert told == {
        "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/chat/ws", "/get_score", "/invocations",
        "/", "/generate", "/generate_stream",
    }  # fmt: skip


def test_a_handler_that_the_table_lacks_is_described_by_its_docstring() -> None:
    async def handler(http: Any) -> Any:
        """What it does.

        And more.
        """

    assert doc(handler).text == "What it does" and inspect.getdoc(handler)
    assert document({"GET": {"/x": handler}}, (), False)["paths"]["/x"]["get"]["summary"] == "What it does"


@pytest.mark.long
def test_the_server_answers_as_the_document_says(folder: Path, tmp_path: Path) -> None:
    async def main() -> tuple[int, str]:
        async with stand(folder) as served:
            return await fuzzed(served, 20, 1, tmp_path, "fuzzing")

    answered, wrong = asyncio.run(main())
    assert wrong == ""
    assert answered > 200
