import msgspec
import pytest
from plain_worker import Sink, ask, sink

from aiollm.engine.judge import UNWRITTEN, Judge, prompt_logprobs
from aiollm.engine.radix import RadixIndex
from aiollm.engine.request import Finish, Request
from aiollm.engine.rows import Row, Table
from aiollm.wire.columns import pack, pack_floats
from aiollm.wire.messages import Header, PromptLogprobs, Result

HEADER = Header(1, 1, 1, 1, 0, 0, b"")


def judge(requests, rows, tokens, generation=5, top=0, top_ids=(), top_logprobs=()):
    """Tokens for the rows of `requests`, which are of generation 5."""
    table, root = Table(len(requests), 20), RadixIndex().root("")
    running = [Row(table, at, 5, request, root) for at, request in enumerate(requests)]
    result = Result(
        header=HEADER, rows=pack(rows), generations=pack([generation] * len(rows)), tokens=pack(tokens),
        logprobs=pack_floats([-i / 4 for i in range(len(rows))]), hints=bytes(len(rows)), top=top,
        top_ids=pack(top_ids), top_logprobs=pack_floats(top_logprobs),
    )  # fmt: skip
    return Judge(result, running, table), running


def ends(request, *tokens):
    """How a request ends by its next tokens, which come one by one; its row is retired at once."""
    for token in tokens:
        verdicts, rows = judge([request], [0], [token])
        for row, finish in verdicts.ends():
            assert row is rows[0] and verdicts.taken == 1
            return finish
    return None


def part(start, values, ids=(), tops=()):
    return PromptLogprobs(
        0, 5, start, pack_floats(values), pack(range(1, 1 + len(values))), pack(ids), pack_floats(tops)
    )


def test_tokens_are_handed_out_in_order():
    first, second = ask([1], max_tokens=9), ask([1], max_tokens=9)
    verdicts, _ = judge([first, second], [1, 0, 1], [7, 8, 9])
    assert list(verdicts.ends()) == [] and verdicts.taken == 3
    assert (first.output, second.output) == ([8], [7, 9]) == (sink(first).ids, sink(second).ids)
    assert [token.logprob for token in sink(second).tokens] == [0.0, -0.5]


def test_hidden_states_reach_the_rows_that_they_are_of_before_their_tokens():
    first, second, third = (ask([1], max_tokens=9) for _ in range(3))
    verdicts, rows = judge([first, second, third], [1, 0, 2], [7, 8, 9])
    verdicts._result = msgspec.structs.replace(
        verdicts._result, hidden_at=pack([0, 2, 1]), hidden=pack_floats([1, 2, 3, 4, 5, 6])
    )
    rows[2] = None
    seen = []
    sink(second).token = lambda token: seen.append(second.hidden.tolist())
    assert list(verdicts.ends()) == []
    assert (first.hidden.tolist(), seen, third.hidden) == ([5, 6], [[1, 2]], None)


def test_hidden_states_of_an_earlier_life_are_nobodys():
    request = ask([1], max_tokens=9)
    verdicts, _ = judge([request], [0], [7], generation=4)
    verdicts._result = msgspec.structs.replace(verdicts._result, hidden_at=pack([0]), hidden=pack_floats([1]))
    assert list(verdicts.ends()) == [] and request.hidden is None


def test_tokens_of_an_earlier_life_of_a_row_are_nobodys():
    request = ask([1], max_tokens=9)
    verdicts, _ = judge([request], [0], [7], generation=4)
    assert list(verdicts.ends()) == [] and verdicts.taken == 0 and request.output == []


def test_nothing_follows_a_rows_last_token():
    """Several tokens of one row in one result, of which the second is the last one."""
    first, second = ask([1], max_tokens=2), ask([1], max_tokens=9)
    verdicts, rows = judge([first, second], [0, 0, 0, 1], [5, 6, 7, 8])
    for row, finish in verdicts.ends():
        assert finish == Finish("length")
        rows[row.index] = None
    assert first.output == [5, 6] and second.output == [8] and verdicts.taken == 3


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
    assert finish is not None and finish.reason == "numerical_error" and "not finite" in finish.error
    assert request.output == [] and sink(request).tokens == []


@pytest.mark.parametrize(("wanted", "expected"), [(-1, ()), (0, ()), (1, ((3, -1.0),)), (2, ((3, -1.0), (4, -2.0)))])
def test_every_row_gets_the_alternatives_it_asked_for(wanted, expected):
    request = ask([1], top_logprobs=wanted)
    requests = [ask([1], top_logprobs=2), request]
    verdicts, _ = judge(requests, [0, 1], [7, 8], top=2, top_ids=[1, 2, 3, 4], top_logprobs=[-9, -9, -1, -2])
    assert list(verdicts.ends()) == []
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
    assert prompt_logprobs(request, part(1, [-1, -2])) == UNWRITTEN


def test_prompt_logprobs_come_once_and_in_order():
    request = ask([1, 2, 3, 4, 5], prompt_logprobs=1)
    assert prompt_logprobs(request, part(1, [-1, -2], [8, 9], [-0.5, -1.5])) is None
    assert prompt_logprobs(request, part(1, [-1, -2], [8, 9], [-0.5, -1.5])) is None, "again, after a pause"
    prompt_logprobs(request, part(2, [-2, -3, -4], [9, 7, 6], [-1.5, -2.5, -3.5]))
    seen = [(token.position, token.logprob, token.top) for token in sink(request).prompt]
    assert seen == [(1, -1, ((8, -0.5),)), (2, -2, ((9, -1.5),)), (3, -3, ((7, -2.5),)), (4, -4, ((6, -3.5),))]
    assert not request.wants_prompt_logprobs
