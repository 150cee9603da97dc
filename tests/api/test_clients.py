"""What is served, as the clients that people have see it: the openai package, LiteLLM and LangChain, in threads and on
an event loop."""

import asyncio
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, TypeVar

import langchain_openai
import openai
import pytest
from stand import CONTEXT, Runner

T = TypeVar("T")
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def litellm() -> ModuleType:
    """It would ask the network for its table of models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        import litellm

        return litellm


def call(served: Runner, work: Callable[[], T], *texts: str) -> T:
    """`work` in a thread, while the server answers with texts."""

    async def main() -> T:
        served.stand.workers.say(*texts)
        return await asyncio.to_thread(work)

    return served.run(main())


def test_the_blocking_openai_client_chats_completes_and_streams(served: Runner) -> None:
    def work() -> None:
        with openai.OpenAI(base_url=served.stand.url + "/v1", api_key="none", max_retries=0) as client:
            model = client.models.list().data[0].id
            chat = client.chat.completions.create(
                model=model, messages=HI, n=2, seed=0, logprobs=True, top_logprobs=2, user="me", store=False,
                metadata={"a": "b"}, service_tier="auto", max_completion_tokens=50,
            )  # fmt: skip
            assert [choice.message.content for choice in chat.choices] == ["Hé 🙂", "two"]
            content = chat.choices[1].logprobs and chat.choices[1].logprobs.content
            assert content and [len(entry.top_logprobs) for entry in content] == [2, 2, 2]
            details = chat.usage and chat.usage.prompt_tokens_details
            assert details is not None and details.cached_tokens is not None
            with client.chat.completions.create(
                model=model, messages=HI, seed=0, stream=True, stream_options={"include_usage": True}
            ) as stream:
                chunks = list(stream)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hé 🙂"
            assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 9
            extra = {"prompt_logprobs": 1, "return_token_ids": True, "truncate_prompt_tokens": 2}
            text = client.completions.create(model=model, prompt=["abc", "de"], best_of=2, seed=0, extra_body=extra)
            assert [choice.to_dict()["prompt_token_ids"] for choice in text.choices] == [[98, 99], [100, 101]]
            with pytest.raises(openai.BadRequestError) as refused:
                client.completions.create(model=model, prompt="x", suffix="y")
            assert (refused.value.param, refused.value.code) == ("suffix", "unsupported_field")
            assert refused.value.request_id

    call(served, work, "Hé 🙂", "two")


def test_litellm_chats_completes_and_streams(served: Runner, litellm: Any) -> None:
    to: Any = {"api_base": served.stand.url + "/v1", "api_key": "none", "num_retries": 0}

    def work() -> None:
        whole = litellm.completion(model="hosted_vllm/tiny", messages=HI, seed=0, **to)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("Hé 🙂", "stop")
        assert whole.usage.total_tokens == 30
        stream = litellm.completion(
            model="openai/tiny", messages=HI, seed=0, stream=True, stream_options={"include_usage": True}, **to
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hé 🙂"
        assert chunks[-1].usage.completion_tokens == 9
        text = litellm.text_completion(model="text-completion-openai/tiny", prompt="x", seed=0, **to)
        assert text.choices[0].text == "Hé 🙂"

    call(served, work, "Hé 🙂")


def test_litellm_knows_errors_for_what_they_are(served: Runner, litellm: Any) -> None:
    to: Any = {"api_base": served.stand.url + "/v1", "api_key": "none", "num_retries": 0}
    long = [{"role": "user", "content": "x" * CONTEXT}]

    async def main() -> None:
        for provider in ("openai", "hosted_vllm"):
            with pytest.raises(litellm.ContextWindowExceededError):
                await litellm.acompletion(model=f"{provider}/tiny", messages=long, **to)
            with pytest.raises(litellm.BadRequestError, match="temperature"):
                await litellm.acompletion(model=f"{provider}/tiny", messages=HI, temperature=3, **to)
            with pytest.raises(litellm.NotFoundError):
                await litellm.acompletion(model=f"{provider}/other", messages=HI, **to)

    served.run(main())


def test_langchain_invokes_streams_and_batches(served: Runner) -> None:
    url: Any = {"base_url": served.stand.url + "/v1", "api_key": "none", "model": "tiny", "max_retries": 0}

    def work() -> None:
        chat = langchain_openai.ChatOpenAI(**url, seed=0, temperature=0.5, max_tokens=20, logprobs=True)
        message = chat.invoke("hi")
        assert message.content == "Hé 🙂" and message.response_metadata["finish_reason"] == "stop"
        assert message.usage_metadata is not None and message.usage_metadata["output_tokens"] == 9
        assert len(message.response_metadata["logprobs"]["content"]) == 8
        pieces = list(chat.stream("hi", stream_usage=True))
        assert "".join(str(piece.content) for piece in pieces) == "Hé 🙂"
        assert [answer.content for answer in chat.batch(["a", "b", "c"])] == ["Hé 🙂"] * 3
        text = langchain_openai.OpenAI(**url, seed=0, max_tokens=20, best_of=1, n=1)
        assert text.invoke("x") == "Hé 🙂" and "".join(text.stream("x")) == "Hé 🙂"
        assert [made[0].text for made in text.generate(["x", "y"]).generations] == ["Hé 🙂"] * 2

    call(served, work, "Hé 🙂")


def test_every_client_sees_that_a_stream_broke_off(served: Runner, litellm: Any) -> None:
    url = served.stand.url + "/v1"

    def pieces(stream: Iterable[Any]) -> int:
        """How many came before it raised."""
        found: list[Any] = []
        with pytest.raises((openai.APIError, litellm.APIError), match="not finite"):
            found.extend(stream)
        return len(found)

    def work() -> None:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            assert pieces(client.chat.completions.create(model="tiny", messages=HI, stream=True)) >= 2
        to: Any = {"api_base": url, "api_key": "none", "num_retries": 0}
        assert pieces(litellm.completion(model="openai/tiny", messages=HI, stream=True, **to)) >= 1
        chat = langchain_openai.ChatOpenAI(base_url=url, api_key="none", model="tiny", max_retries=0)
        assert pieces(chat.stream("hi")) >= 1

    async def main() -> None:
        served.stand.workers.reply = lambda prompt, seed: [97, 98, 99, -1]  # logits that are not finite
        await asyncio.to_thread(work)

    served.run(main())
