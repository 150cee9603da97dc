from pathlib import Path

import msgspec

from aiollm.api.choice import Entry
from aiollm.api.logprobs import TokenNames, chat_logprobs, completion_logprobs
from aiollm.text.tokenizer import Tokenizer


def names(folder: Path, as_ids: bool = False) -> TokenNames:
    return TokenNames(Tokenizer.load(str(folder)), as_ids)


def test_minus_infinity_can_be_said_in_json(folder: Path) -> None:
    entries = [Entry(97, float("-inf"), ((99, -1.0), (98, float("-inf"))), 0)]
    for shape in (chat_logprobs, completion_logprobs):
        text = msgspec.json.encode(shape(entries, names(folder)))
        assert b"-9999.0" in text and b"null" not in text


def test_of_several_ids_with_one_text_the_likeliest_stays(folder: Path) -> None:
    broken = [0xF0, 0x9F]  # halves of a character look the same
    entries = [Entry(broken[1], -5.0, ((broken[0], -1.0), (97, -2.0), (broken[1], -5.0)), 0)]
    assert completion_logprobs(entries, names(folder))["top_logprobs"] == [{"\ufffd": -1.0, "a": -2.0}]


def test_the_drawn_token_is_always_among_the_alternatives(folder: Path) -> None:
    entries = [Entry(99, -5.0, ((97, -1.0),), 0)]
    assert completion_logprobs(entries, names(folder))["top_logprobs"] == [{"a": -1.0, "c": -5.0}]


def test_ids_tell_tokens_of_one_text_apart(folder: Path) -> None:
    entries = [Entry(0x9F, -1.0, ((0xF0, -2.0),), 0)]
    shaped = completion_logprobs(entries, names(folder, as_ids=True))
    assert shaped["tokens"] == ["token_id:159"]
    assert shaped["top_logprobs"] == [{"token_id:240": -2.0, "token_id:159": -1.0}]


def test_bytes_of_halves_of_a_character_are_exact(folder: Path) -> None:
    content = chat_logprobs([Entry(0xF0, -1.0, (), 0)], names(folder))["content"]
    assert content == [{"token": "\ufffd", "logprob": -1.0, "bytes": [0xF0], "top_logprobs": []}]


def test_tokens_of_one_piece_stand_side_by_side(folder: Path) -> None:
    """The first of a prompt has no logprob, and no alternatives."""
    entries = [Entry(97, None, (), 0), Entry(98, -1.0, ((98, -1.0), (99, -2.0)), 1)]
    assert completion_logprobs(entries, names(folder)) == {
        "tokens": ["a", "b"],
        "token_logprobs": [None, -1.0],
        "top_logprobs": [None, {"b": -1.0, "c": -2.0}],
        "text_offset": [0, 1],
    }
    assert chat_logprobs(entries, names(folder))["content"] == [
        {"token": "a", "logprob": None, "bytes": [97], "top_logprobs": []},
        {
            "token": "b",
            "logprob": -1.0,
            "bytes": [98],
            "top_logprobs": [
                {"token": "b", "logprob": -1.0, "bytes": [98]},
                {"token": "c", "logprob": -2.0, "bytes": [99]},
            ],
        },
    ]
