import pytest
from plain_worker import Sink, ask, sink

from aiollm.engine.judge import UNWRITTEN, Judge
from aiollm.engine.request import Finish, Request
from aiollm.wire.columns import pack, pack_floats
from aiollm.wire.messages import Header, PromptLogprobs, Result

HEADER = Header(1, 1, 1, 1, 0, 0, b"")


def judge(tokens, top=0, top_ids=(), top_logprobs=()):
    count = len(tokens)
    return Judge(
        Result(
            header=HEADER, rows=pack(range(count)), generations=pack([5] * count), tokens=pack(tokens),
            logprobs=pack_floats([-i / 4 for i in range(count)]), hints=bytes(count), top=top,
            top_ids=pack(top_ids), top_logprobs=pack_floats(top_logprobs),
        )
    )  # fmt: skip


def ends(request, *tokens):
    """How a request ends by its next tokens."""
    for token in tokens:
        finish = judge([token]).token(request, 0)
        if finish is not None:
            return finish
    return None


def part(start, values, ids=(), tops=()):
    return PromptLogprobs(0, 5, start, pack_floats(values), pack(ids), pack_floats(tops))


def test_rows_and_tokens_are_read_in_order():
    request, verdicts = ask([1], max_tokens=9), judge([7, 8])
    assert verdicts.rows == [(0, 5), (1, 5)]
    assert verdicts.token(request, 1) is None and verdicts.token(request, 0) is None
    assert request.output == sink(request).ids == [8, 7]
    assert [token.logprob for token in sink(request).tokens] == [-0.25, 0.0]


def test_length_ends_a_request():
    assert ends(ask([1], max_tokens=2), 5) is None
    assert ends(ask([1], max_tokens=2), 5, 6) == Finish("length")


def test_a_stop_id_ends_a_request_and_is_marked():
    request = ask([1], max_tokens=9, stop_ids=(4, 3))
    assert ends(request, 5, 3) == Finish("stop", 3)
    assert [token.ends for token in sink(request).tokens] == [False, True]


def test_the_end_of_sequence_is_no_stop_reason():
    request = Request("r", ask([1]).prompt, ask([1], stop_ids=(0, 3)).sampling, Sink(), eos_ids=frozenset([0]))
    assert ends(request, 0) == Finish("stop", None)


def test_stop_ids_before_min_tokens_are_tokens_like_others():
    request = ask([1], max_tokens=9, min_tokens=2, stop_ids=(3,))
    assert ends(request, 3, 3) is None
    assert [token.ends for token in sink(request).tokens] == [False, False]
    assert ends(request, 3) == Finish("stop", 3)


def test_a_stop_counts_before_the_length():
    assert ends(ask([1], max_tokens=1, stop_ids=(3,)), 3) == Finish("stop", 3)


def test_a_stop_string_ends_a_request():
    request = ask([1], max_tokens=1)
    request.sink.token = lambda token: "END"
    assert ends(request, 5) == Finish("stop", "END")


def test_logits_that_are_not_finite_end_a_request_without_a_token():
    request = ask([1])
    finish = ends(request, -1)
    assert finish is not None and finish.reason == "error" and "not finite" in finish.error
    assert request.output == [] and sink(request).tokens == []


@pytest.mark.parametrize(("wanted", "expected"), [(-1, ()), (0, ()), (1, ((3, -1.0),)), (2, ((3, -1.0), (4, -2.0)))])
def test_every_row_gets_the_alternatives_it_asked_for(wanted, expected):
    request = ask([1], top_logprobs=wanted)
    verdicts = judge([7, 8], top=2, top_ids=[1, 2, 3, 4], top_logprobs=[-9, -9, -1, -2])
    verdicts.token(request, 1)
    assert sink(request).tokens[0].top == expected


def broken(*_):
    raise OSError("the client's pipe is gone")


def test_an_output_that_cannot_be_written_ends_its_request_only(caplog):
    request = ask([1])
    request.sink.token = broken
    assert ends(request, 5) == UNWRITTEN
    assert "pipe is gone" in caplog.text
    request = ask([1, 2, 3], prompt_logprobs=0)
    request.sink.prompt_tokens = broken
    assert judge([]).prompt_logprobs(request, part(1, [-1, -2])) == UNWRITTEN


def test_prompt_logprobs_come_once_and_in_order():
    request, verdicts = ask([1, 2, 3, 4, 5], prompt_logprobs=1), judge([])
    assert verdicts.prompt_logprobs(request, part(1, [-1, -2], [8, 9], [-0.5, -1.5])) is None
    assert verdicts.prompt_logprobs(request, part(1, [-1, -2], [8, 9], [-0.5, -1.5])) is None, "again, after a pause"
    verdicts.prompt_logprobs(request, part(2, [-2, -3, -4], [9, 7, 6], [-1.5, -2.5, -3.5]))
    seen = [(token.position, token.logprob, token.top) for token in sink(request).prompt]
    assert seen == [(1, -1, ((8, -0.5),)), (2, -2, ((9, -1.5),)), (3, -3, ((7, -2.5),)), (4, -4, ((6, -3.5),))]
    assert not request.wants_prompt_logprobs
