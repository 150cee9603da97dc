"""Several choices of one prompt: what is computed for them, and which of them are told."""

import asyncio
import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from stand import Runner

from aiollm.api.answer import RUNNING

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
GREEDY = {"prompt": "say", "temperature": 0, "seed": 0}


def post(served: Runner, path: str, body: dict[str, Any], *texts: str) -> Any:
    """The answer, and how many tokens were drawn for it."""

    async def main() -> Any:
        served.stand.workers.say(*texts)
        status, answer = await served.stand.post(path, body)
        assert status == 200, answer
        return answer

    return served.run(main())


def texts(answer: Any) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def test_greedy_choices_are_computed_once_and_copied(served: Runner) -> None:
    answer = post(served, TEXT, {**GREEDY, "n": 5, "logprobs": 1, "return_token_ids": True}, "abc")
    assert served.stand.workers.launched == 4
    first, *others = answer["choices"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4]
    assert others == [{**first, "index": index} for index in range(1, 5)] and first["text"] == "abc"
    assert answer["usage"]["prompt_tokens"] == 3 and answer["usage"]["completion_tokens"] == 5 * 4


def test_greedy_choices_of_several_prompts_stay_with_their_prompts(served: Runner) -> None:
    async def main() -> Any:
        return await served.stand.post(TEXT, {"prompt": ["ab", "c"], "temperature": 0, "n": 2})

    _, answer = served.run(main())
    assert texts(answer) == ["ab", "ab", "c", "c"]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "total_tokens": 13,
        "completion_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize("stop", [None, "c"])
def test_greedy_choices_are_streamed_each(served: Runner, stop: str | None) -> None:
    async def main() -> bytes:
        served.stand.workers.say("a🙂bcd")
        body = {"messages": [{"role": "user", "content": "x"}], "temperature": 0, "seed": 0, "n": 3, "stop": stop}
        return await served.stand.events(CHAT, body)

    events = served.run(main()).decode().split("\n\n")[:-2]
    found, ends = ["", "", ""], []
    for event in events:
        (choice,) = json.loads(event.removeprefix("data: "))["choices"]
        found[choice["index"]] += choice["delta"].get("content", "")
        ends += [choice["index"]] if choice["finish_reason"] else []
    assert found == ["a🙂b" if stop else "a🙂bcd"] * 3 and sorted(ends) == [0, 1, 2]


def test_a_client_that_leaves_ends_what_is_computed_for_all(served: Runner) -> None:
    async def main() -> None:
        served.stand.workers.held = True
        async with served.stand.session.post(
            served.stand.url + TEXT, json={**GREEDY, "n": 4, "stream": True}
        ) as response:
            assert response.status == 200
        await served.stand.until(lambda: served.stand.engine.core is not None and served.stand.engine.core.idle)

    served.run(main())


def test_a_failure_of_the_one_that_is_computed_is_told(served: Runner) -> None:
    async def main() -> Any:
        served.stand.workers.reply = lambda prompt, seed: [-1]  # logits that are not finite
        return await served.stand.post(TEXT, {**GREEDY, "n": 3})

    status, answer = served.run(main())
    assert (status, answer["error"]["code"]) == (500, "numerical_error")


# A byte's made-up logprob is -byte / 64. "z!" has a larger sum than "0000", and a smaller mean.
RANKED = ["z!", "0000", "mm!", "bbbb"]


@pytest.mark.parametrize(
    ("n", "expected"),
    [(None, ["0000"]), (1, ["0000"]), (3, ["0000", "z", "mm"]), (4, ["z", "0000", "mm", "bbbb"])],
)
def test_of_best_of_choices_the_likeliest_are_told(served: Runner, n: int | None, expected: Sequence[str]) -> None:
    body = {"prompt": "x", "best_of": 4, "n": n, "seed": 0, "max_tokens": 4, "stop": "!"}
    answer = post(served, TEXT, body, *RANKED)
    assert texts(answer) == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 2 + 4 + 3 + 4, "what was computed counts"


def test_best_of_is_ranked_within_each_prompt(served: Runner) -> None:
    async def main() -> Any:
        served.stand.workers.reply = lambda prompt, seed: [prompt[0] + seed]
        body = {"prompt": ["c", "b", "a"], "best_of": 3, "n": 2, "seed": 0, "logprobs": 0, "max_tokens": 1}
        return await served.stand.post(TEXT, body)

    status, answer = served.run(main())
    assert status == 200 and texts(answer) == ["c", "d", "b", "c", "a", "b"]
    assert [choice["logprobs"]["tokens"] for choice in answer["choices"]] == [[text] for text in "cdbcab"]
    assert answer["usage"]["prompt_tokens"] == 3


def test_the_best_of_greedy_choices_is_any_of_them(served: Runner) -> None:
    assert texts(post(served, TEXT, {**GREEDY, "best_of": 8}, "ab")) == ["ab"]
    assert served.stand.workers.launched == 3


@pytest.mark.parametrize("logprobs", [None, 0])
def test_the_best_may_be_echoed(served: Runner, logprobs: int | None) -> None:
    body = {"prompt": "x", "best_of": 3, "seed": 0, "max_tokens": 2, "echo": True, "logprobs": logprobs}
    (choice,) = post(served, TEXT, body, "zz", "aa", "mm")["choices"]
    assert choice["text"] == "xaa"
    assert (choice["logprobs"] and choice["logprobs"]["tokens"]) == (None if logprobs is None else ["x", "a", "a"])


def test_best_of_has_limits(served: Runner) -> None:
    for body, words in (
        ({"best_of": 2, "n": 3}, "fewer than the 3 of n"),
        ({"best_of": 2, "stream": True}, "cannot be streamed"),
        ({"best_of": 129}, "at most 128"),
        ({"best_of": 100, "prompt": ["x"] * 20}, "100 choices of 20 prompts"),
    ):
        status, answer = served.run(served.stand.post(TEXT, {"prompt": "x", **body}))
        assert (status, answer["error"]["param"]) == (400, "best_of") and words in answer["error"]["message"]


@pytest.mark.parametrize("streams", [False, True])
def test_more_scores_of_prompts_than_an_answer_holds_are_refused(served: Runner, streams: bool) -> None:
    body = {"prompt": [[65] * 500] * (100 if not streams else 1), "echo": True, "logprobs": 20, "max_tokens": 1}
    status, answer = served.run(served.stand.post(TEXT, {**body, "stream": streams}))
    assert (status, answer["error"]["param"]) == (400, "echo")
    assert ("a stream holds 8192" if streams else "an answer holds 262144") in answer["error"]["message"]


def test_a_long_document_is_made_beside_the_event_loop(served: Runner) -> None:
    answer = post(served, TEXT, {"prompt": [65] * 500, "echo": True, "logprobs": 20, "max_tokens": 2, "n": 2}, "yz")
    for choice in answer["choices"]:
        assert choice["text"] == "A" * 500 + "yz" and len(choice["logprobs"]["top_logprobs"]) == 502
        assert len(choice["logprobs"]["top_logprobs"][499]) == 20


FIELDS: dict[str, list[Any]] = {
    "n": [1, 2, 3],
    "temperature": [0, 1],
    "max_tokens": [1, 5, 9],
    "min_tokens": [0, 1],
    "stop": ["b", ["é", "cd"]],
    "stop_token_ids": [[99]],
    "include_stop_str_in_output": [True],
    "return_token_ids": [True],
    "return_tokens_as_token_ids": [True],
    "ignore_eos": [True],
    "skip_special_tokens": [False],
    "truncate_prompt_tokens": [-1, 2, 4],
    "truncation_side": ["right"],
    "cache_salt": ["a", "b"],
}
ONLY_TEXT: dict[str, list[Any]] = {
    "logprobs": [0, 3],
    "echo": [True],
    "prompt": ["x", "é🙂", ["ab", "🙂c"], [[240, 159], [65]]],
}
ONLY_CHAT: dict[str, list[Any]] = {"logprobs": [True], "max_completion_tokens": [9]}


def joined(events: bytes, count: int) -> list[dict[str, Any]]:
    """The choices of a stream, as a document has them."""
    parts = events.decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    found: list[dict[str, Any]] = [{"text": "", "logprobs": {}, "ids": [], "ends": []} for _ in range(count)]
    for part in parts[:-2]:
        for choice in json.loads(part.removeprefix("data: "))["choices"]:
            made = found[choice["index"]]
            made["text"] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            made["ids"] += choice.get("token_ids", [])
            for name, entries in (choice["logprobs"] or {}).items():
                made["logprobs"].setdefault(name, []).extend(entries)
            if choice["finish_reason"]:
                made["ends"].append((choice["finish_reason"], choice["stop_reason"]))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_streams_and_documents_say_the_same_for_random_fields(served: Runner, seed: int) -> None:
    rng = random.Random(seed)

    async def main() -> None:
        served.stand.workers.reply = lambda prompt, seed: [*prompt[seed:], *"abécd🙂".encode()]
        for _ in range(50):
            path, own = rng.choice([(TEXT, ONLY_TEXT), (CHAT, ONLY_CHAT)])
            known = FIELDS | own
            body = {name: rng.choice(known[name]) for name in rng.sample(list(known), rng.randrange(7))}
            body |= {"seed": 0, **({"messages": [{"role": "user", "content": "é🙂"}]} if path == CHAT else {})}
            body |= {"prompt": "xyz"} if path == TEXT and "prompt" not in body else {}
            body.pop("max_tokens" if "max_completion_tokens" in body else "", None)
            status, answer = await served.stand.post(path, body)
            assert status == 200, (body, answer)
            streamed = joined(await served.stand.events(path, body), len(answer["choices"]))
            for choice, made in zip(answer["choices"], streamed, strict=True):
                text = choice["text"] if path == TEXT else choice["message"]["content"]
                assert made["text"] == text and made["ids"] == choice.get("token_ids", []), body
                assert made["ends"] == [(choice["finish_reason"], choice["stop_reason"])], body
                entries = {name: told for name, told in (choice["logprobs"] or {}).items() if told}
                assert {name: told for name, told in made["logprobs"].items() if told} == entries, body

    served.run(main())


def test_many_that_end_at_once_are_waked_in_turn(served: Runner) -> None:
    async def main() -> None:
        stand = served.stand
        stand.workers.held = True
        asked = [asyncio.create_task(stand.post(TEXT, GREEDY)) for _ in range(3)]
        core, running = stand.engine.core, stand.app[RUNNING]
        assert core is not None
        await stand.until(lambda: len(running) == len(asked))
        for generation in running:
            generation.abort()
        assert all(choice.finish is not None for generation in running for choice in generation.choices)
        assert not any(generation.changed.is_set() for generation in running)
        assert [status for status, _ in await asyncio.gather(*asked)] == [400] * len(asked)
        stand.workers.release()

    served.run(main())
