import numpy as np
import pytest
from stand import CONTEXT, Runner

from aiollm.api.convert import output_limit, prompt_array, sampling_params, seed_of, shortened
from aiollm.api.errors import ApiError
from aiollm.api.parts import Parts
from aiollm.api.schema import CompletionRequest
from aiollm.wire.sampling import SamplingParams

VOCABULARY = 259
EOS = 258


def sampling(parts: Parts, **fields: object) -> SamplingParams:
    return sampling_params(parts, CompletionRequest(prompt="x", **fields), 5, -1, -1)


def small_pool(parts: Parts, slots: int) -> Parts:
    """The same parts over an engine whose pool is smaller than the context."""

    class Small:
        limits = parts.engine.limits._replace(slots=slots)
        ready = parts.engine.ready

    return parts._replace(engine=Small())


def test_fields_arrive_under_the_engine_s_names(served: Runner) -> None:
    got = sampling(
        served.stand.parts, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=1, frequency_penalty=-1,
        repeat_penalty=1.2, logit_bias={5: -3}, seed=9, min_tokens=2, stop_token_ids=[7, EOS],
    )  # fmt: skip
    assert got == SamplingParams(
        max_tokens=5, min_tokens=2, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=1,
        frequency_penalty=-1, repetition_penalty=1.2, logit_bias={5: -3}, seed=9, stop_ids=(EOS, 7),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("top_k", "used"), [(-1, 0), (0, 0), (1, 1), (VOCABULARY - 1, 258), (VOCABULARY, 0), (10**6, 0)]
)
def test_a_top_k_that_cuts_nothing_is_off(served: Runner, top_k: int, used: int) -> None:
    assert sampling(served.stand.parts, top_k=top_k).top_k == used


def test_seeds_are_drawn_where_none_is_given(served: Runner) -> None:
    assert sampling(served.stand.parts).seed != sampling(served.stand.parts).seed
    assert sampling(served.stand.parts, seed=0).seed == 0


def test_ignored_eos_does_not_stop(served: Runner) -> None:
    assert sampling(served.stand.parts, ignore_eos=True, stop_token_ids=[4]).stop_ids == (4,)


def test_a_token_is_computed_even_where_none_is_wanted(served: Runner) -> None:
    assert sampling_params(served.stand.parts, CompletionRequest(prompt="x"), 0, -1, 0).max_tokens == 1


@pytest.mark.parametrize(("seed", "index", "expected"), [(5, 0, 5), (5, 3, 8), (-1, 1, 0), (2**63 - 1, 1, -(2**63))])
def test_seeds_wrap_around_in_64_bits(seed: int, index: int, expected: int) -> None:
    assert seed_of(seed, index) == expected


@pytest.mark.parametrize(
    ("prompt", "asked", "default", "expected"),
    [
        (10, None, None, CONTEXT - 10),
        (10, None, 16, 16),
        (CONTEXT - 3, None, 16, 3),
        (10, 7, 16, 7),
        (10, 0, 16, 0),
        (10, CONTEXT, None, CONTEXT - 10),
    ],
)
def test_the_output_fills_what_is_left(
    served: Runner, prompt: int, asked: int | None, default: int | None, expected: int
) -> None:
    assert output_limit(served.stand.parts, prompt, asked, default, "prompt") == expected


def test_a_pool_smaller_than_the_context_is_the_limit(served: Runner) -> None:
    parts = small_pool(served.stand.parts, 99)
    assert output_limit(parts, 90, None, None, "prompt") == 10  # the last token needs no slot
    with pytest.raises(ApiError, match="maximum context length is 100 tokens"):
        output_limit(parts, 90, 101, None, "prompt")


def test_ids_up_to_the_vocabulary_make_a_prompt(served: Runner) -> None:
    assert prompt_array(served.stand.parts, [0, VOCABULARY - 1], "prompt").tolist() == [0, 258]
    with pytest.raises(ApiError, match="token id 259 is outside the vocabulary of 259 ids"):
        prompt_array(served.stand.parts, [VOCABULARY], "prompt")


@pytest.mark.parametrize(
    ("mode", "length", "asked", "default", "kept"),
    [
        ("none", CONTEXT + 90, 10, None, [(0, CONTEXT + 90)]),
        ("head", CONTEXT - 10, 10, None, [(0, CONTEXT - 10)]),
        ("head", CONTEXT, 12, None, [(12, CONTEXT)]),
        ("head", 1000, None, 16, [(1000 - (CONTEXT - 16), 1000)]),
        ("head", 1000, None, None, [(1000 - CONTEXT * 3 // 4, 1000)]),
        ("head", 1000, 0, None, [(1000 - CONTEXT, 1000)]),
        ("center", 1000, 12, None, [(0, 250), (750, 1000)]),
        ("center", CONTEXT, 11, None, [(0, 250), (261, CONTEXT)]),
        ("head", 1000, CONTEXT, None, [(0, 1000)]),
    ],
)
def test_a_prompt_that_is_too_long_loses_what_its_server_was_told(
    served: Runner, mode: str, length: int, asked: int | None, default: int | None, kept: list[tuple[int, int]]
) -> None:
    """What asks for more output than the context is left as it is, and refused."""
    parts = served.stand.parts
    parts = parts._replace(settings=parts.settings._replace(long_truncation_mode=mode))
    prompt = np.arange(length)
    expected = [token for begin, end in kept for token in range(begin, end)]
    assert shortened(parts, prompt, asked, default).tolist() == expected
