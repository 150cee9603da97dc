"""The README's tables of endpoints and fields are those of the code."""

import endpoints
import msgspec

from aiollm.api.app import GET, POST
from aiollm.api.openapi import plain
from aiollm.api.schema import ChatRequest


def test_the_readme_lists_endpoints_and_fields_as_they_are() -> None:
    text = endpoints.README.read_text(encoding="utf-8")
    assert endpoints.written(text) == text, "run make tables"


def test_every_route_and_every_field_is_listed() -> None:
    listed = "\n".join(endpoints.endpoints())
    assert all(f"`{plain(path)}`" in listed for path in GET | POST)
    lines = "\n".join(endpoints.fields())
    for kind in endpoints.TYPES:
        for field in msgspec.structs.fields(kind):
            assert f"`{field.name}`" in lines, f"{kind.__name__}.{field.name}"


def test_every_field_is_explained() -> None:
    for kind in endpoints.TYPES:
        for name, (text, *_) in endpoints._fields(kind).items():
            assert text, f"{kind.__name__}.{name} has no line in aiollm/api/field_texts.py"


def test_values_and_defaults_are_told_in_words() -> None:
    lines = "\n".join(endpoints.fields())
    assert "| number 0 to 2 | the model's, or 1 |" in lines
    assert "| text or list of text or token ids or list of token ids | required |" in lines
    assert "| true or false | false |" in lines


def test_fields_are_told_of_whatever_their_type_is() -> None:
    """Refused ones by the type Any, ignored ones by that of raw JSON without a line, with any default."""

    class Odd(msgspec.Struct):
        tools: endpoints.Any = None
        whatever: msgspec.Raw = msgspec.Raw()
        messages: msgspec.Raw = msgspec.Raw()
        temperature: tuple[int, float] | None = None
        kind: str | msgspec.UnsetType = msgspec.UNSET

    found = endpoints._fields(Odd)
    assert found["tools"][0] == endpoints.openapi.REFUSED and found["whatever"][0] == endpoints.openapi.IGNORED
    assert found["messages"][0] == "the conversation so far" and found["temperature"][1] == "list"
    assert found["kind"] == ("", "text", "")


def test_chats_and_completions_have_a_table_for_what_they_share() -> None:
    first = "\n".join(endpoints.fields()).split("\n| `/v1/chat/completions` |")[0]
    assert "`temperature`" in first and "`messages`" not in first and "`prompt`" not in first
    assert len(msgspec.structs.fields(ChatRequest)) > 30
