import random

import pytest

from aiollm.text.folder import TextError
from aiollm.text.stop import StopStrings


def run(stops: list[str], chunks: list[str], include: bool = False) -> tuple[str, str | None]:
    search = StopStrings(stops, include)
    output, match = "", None
    for chunk in chunks:
        text, match = search.push(chunk)
        output += text
    return output + search.finish(), match


def oracle(stops: list[str], text: str, include: bool, least: int = 0) -> tuple[str, str | None]:
    """Read character by character: the first place behind `least` characters where any stop string ends, the longest
    that ends there."""
    for end in range(least + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def random_cut(rng: random.Random, text: str) -> list[str]:
    places = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(8)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("include", [False, True])
def test_any_stops_text_and_cut_agree_with_reading_single_characters(include):
    rng = random.Random(11)
    for _ in range(4000):
        stops = ["".join(rng.choices("ab🙂", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        text = "".join(rng.choices("abc🙂", k=rng.randrange(25)))
        expected = oracle(stops, text, include)
        assert run(stops, random_cut(rng, text), include) == expected
        assert run(stops, list(text), include) == expected


def test_what_is_held_is_the_longest_true_partial_match_and_no_more():
    rng = random.Random(12)
    for _ in range(2000):
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(2)]
        search, seen, given = StopStrings(stops), "", ""
        for character in rng.choices("abc", k=12):
            text, match = search.push(character)
            seen, given = seen + character, given + text
            if match:
                break
            ends = [seen[start:] for start in range(len(seen) + 1)]
            assert seen[len(given) :] == next(end for end in ends if any(stop.startswith(end) for stop in stops))


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_that_ends_in_skipped_text_is_none_and_one_that_begins_there_is(include):
    rng = random.Random(13)
    for _ in range(4000):
        stops = ["".join(rng.choices("ab🙂", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        text, least = "".join(rng.choices("abc🙂", k=rng.randrange(25))), rng.randrange(12)
        search, output, match = StopStrings(stops, include), "", None
        for piece in random_cut(rng, text[:least]):
            output += search.skip(piece)
        for piece in random_cut(rng, text[least:]):
            given, match = search.push(piece)
            output += given
        assert (output + search.finish(), match) == oracle(stops, text, include, least)


def test_no_text_and_no_stop_strings_are_read_more_than_once():
    """Strings that begin again and again within themselves, and text that breaks off at their ends."""
    looks = 0

    class Watched(str):
        def __getitem__(self, place):
            nonlocal looks
            looks += 1
            return str.__getitem__(self, place)

    stops = [Watched("a" * (1000 - n) + "b" + "a" * (23 + n)) for n in range(32)]
    text = ("a" * 1022 + "c" + "ba" * 100) * 4
    search = StopStrings(stops)
    assert "".join(search.push(character)[0] for character in text) + search.finish() == text
    assert looks < len(stops) * (4 * len(text) + 8 * len(stops[0]))


def test_text_without_a_partial_match_is_given_out_at_once():
    search = StopStrings(["</s>", "Observation:"])
    assert search.push("nothing here") == ("nothing here", None)
    assert search.push("a < b </") == ("a < b ", None)
    assert search.push("p>") == ("</p>", None)


def test_after_a_match_nothing_more_comes_out():
    search = StopStrings(["END"])
    assert search.push("one END two") == ("one ", "END")
    assert search.push("three") == ("", "END")
    assert search.finish() == ""


def test_stop_equal_to_the_first_token_gives_empty_text():
    assert run(["Hi"], ["Hi", " there"]) == ("", "Hi")


def test_included_stop_string_is_the_end_of_the_text():
    assert run(["END"], ["one E", "ND two"], include=True) == ("one END", "END")


def test_held_text_comes_out_at_the_end():
    search = StopStrings(["END"])
    assert search.push("the EN") == ("the ", None)
    assert search.finish() == "EN"
    assert search.finish() == ""


def test_no_stop_strings_pass_everything():
    assert run([], ["a", "", "b"]) == ("ab", None)


def test_empty_stop_string_is_refused():
    with pytest.raises(TextError, match="must not be empty"):
        StopStrings(["a", ""])
