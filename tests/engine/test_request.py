import numpy as np
from plain_worker import ask

from aiollm.engine.request import State


def test_a_request_knows_its_prompt_and_then_its_output():
    request = ask([1, 2, 3], max_tokens=5)
    assert (request.known, request.limit, request.state) == (3, 8, State.WAITING)
    request.output += [8, 9]
    assert request.known == 5 and request.limit == 8
    assert request.tokens().tolist() == [1, 2, 3, 8, 9] and request.tokens().dtype == np.int64


def test_prompt_logprobs_are_wanted_until_all_were_seen():
    assert not ask([1, 2, 3]).wants_prompt_logprobs
    assert not ask([1], prompt_logprobs=0).wants_prompt_logprobs, "the first token has none"
    request = ask([1, 2, 3], prompt_logprobs=0)
    assert request.wants_prompt_logprobs
    request.prompt_seen += 2
    assert not request.wants_prompt_logprobs
