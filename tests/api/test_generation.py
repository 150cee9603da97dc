"""Several choices of one prompt: what is computed for them, and which of them are told."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from stand import Runner

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
    assert (status, answer["error"]["code"]) == (500, "engine_error")


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
