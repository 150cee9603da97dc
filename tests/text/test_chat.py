import inspect
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import CHATML, write_byte_tokenizer, write_json

from aiollm.text import chat
from aiollm.text.chat import ChatTemplate, NameTaken
from aiollm.text.folder import TextError

# Llama 2 style: the system message goes into the first turn, roles must alternate, the tokenizer's own tokens appear.
LLAMA = """{% if messages[0]['role'] == 'system' %}
    {% set system = '<<SYS>>\\n' ~ messages[0]['content'] ~ '\\n<</SYS>>\\n\\n' %}
    {% set turns = messages[1:] %}
{% else %}
    {% set system = '' %}
    {% set turns = messages %}
{% endif %}
{% for message in turns %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% set content = system ~ message['content'] if loop.first else message['content'] %}
    {% if message['role'] == 'user' %}
{{ bos_token }}[INST] {{ content | trim }} [/INST]
    {%- else %}
 {% generation %}{{ content | trim }} {{ eos_token }}{% endgeneration %}
    {%- endif %}
{% endfor %}
"""
# Qwen style: tools as JSON, tool calls, reasoning, a loop control, a namespace, a macro, content that may be parts.
TOOLS = """{%- macro text(content) -%}
    {%- if content is string %}{{ content }}{% else %}
        {%- for part in content %}{{ part.text }}{% endfor %}
    {%- endif %}
{%- endmacro -%}
{%- set state = namespace(users=0) %}
{%- if tools %}
# Tools
{%- for tool in tools %}
{{ tool | tojson }}
{{ tool.function | tojson(indent=2) }}
{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'nobody' %}{% continue %}{% endif %}
    {%- if message.role == 'user' %}{% set state.users = state.users + 1 %}{% endif %}
<{{ message.role }} {{ state.users }}>
    {%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
    {{- text(message.content) }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n' ~ call.function.name ~ ' ' ~ (call.function.arguments | tojson) }}
        {%- for name, value in call.function.arguments.items() %} {{ name }}={{ value }}{% endfor %}
    {%- endfor %}
</{{ message.role }}>
{%- endfor %}
{%- if add_generation_prompt %}<assistant>{% if enable_thinking %}<think>{% endif %}{% endif %}"""

TURNS = [
    {"role": "system", "content": "Be <kind> & brief."},
    {"role": "user", "content": "  Hé 🙂 "},
    {"role": "assistant", "content": "Yes. "},
    {"role": "user", "content": "Go on"},
]
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "é <b>", "parameters": {"z": 1, "a": [True, None]}},
}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"b": "<é>", "a": 1}}}
TOOL_TURNS = [
    *TURNS,
    {"role": "nobody", "content": "unseen"},
    {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"x": 1}'},
    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
]


def template(source: str, **variables: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, variables)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("source", "messages", "options"),
    [
        (CHATML, TURNS, {}),
        (CHATML, TURNS, {"add_generation_prompt": False}),
        (CHATML, TURNS[:3], {"add_generation_prompt": False, "continue_final_message": True}),
        (LLAMA, TURNS, {}),
        (LLAMA, TURNS[1:], {}),
        (LLAMA, TURNS[:3], {"add_generation_prompt": False}),
        (LLAMA, TURNS[:3], {"add_generation_prompt": False, "continue_final_message": True}),
        (TOOLS, TOOL_TURNS, {}),
        (TOOLS, TOOL_TURNS, {"tools": [TOOL, TOOL]}),
        (TOOLS, TOOL_TURNS, {"add_generation_prompt": False, "continue_final_message": True}),
        (TOOLS, TOOL_TURNS, {"tools": [TOOL], "enable_thinking": True}),
    ],
)
def test_rendering_is_that_of_transformers(tmp_path: Path, source, messages, options):
    from transformers import PreTrainedTokenizerFast

    write_byte_tokenizer(tmp_path, chat_template=source)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write_json(tmp_path, "tokenizer_config.json", config | {"bos_token": "<|endoftext|>"})
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    expected = theirs.apply_chat_template(messages, tokenize=False, **{"add_generation_prompt": True, **options})
    kwargs = {"enable_thinking": options.pop("enable_thinking")} if "enable_thinking" in options else None
    assert ChatTemplate.load(str(tmp_path)).render(messages, kwargs=kwargs, **options) == expected


def test_continued_message_is_left_open_without_a_generation_prompt():
    assert template(CHATML).render(TURNS[1:3], continue_final_message=True).endswith("<|im_start|>assistant\nYes. ")


def test_continued_message_ends_as_the_template_leaves_it():
    for source, expected in (
        ("<{{ messages[0].content }}>", "<a  "),
        ("<{{ messages[0].content | trim }}>", "<a"),
        ("{{ add_generation_prompt }}<{{ messages[0].content }}>", "False<a  "),
        ("{% for part in messages[0].content %}<{{ part.text }}>{% endfor %}", "<first><a  "),
    ):
        content = [{"type": "text", "text": "first"}, {"type": "text", "text": "a  "}] if "for" in source else "a  "
        assert template(source).render(user(content), continue_final_message=True) == expected


def test_generation_block_is_a_scope_of_its_own():
    source = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    assert template(source).render(user("a")) == "21"


@pytest.mark.parametrize("messages", [[], user([{"type": "image"}])], ids=["none", "no text"])
def test_nothing_to_continue_is_an_error(messages):
    with pytest.raises(TextError, match="continue_final_message needs"):
        template("{% for part in messages[0].content %}{% endfor %}").render(messages, continue_final_message=True)


def test_template_that_drops_the_last_message_cannot_continue_it():
    with pytest.raises(TextError, match="leaves out"):
        template("fixed").render(user("a"), continue_final_message=True)


def test_the_template_s_own_refusal_is_the_message():
    with pytest.raises(TextError, match="Conversation roles must alternate"):
        template(LLAMA).render([TURNS[1], TURNS[1]])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].nope.nope }}",
        "{{ 1 + messages[0].content }}",
        "{{ 1 / 0 }}",
        "{{ messages[9].role }}",
        "{{ x | tojson }}",
    ],
)
def test_any_failure_of_the_template_is_a_text_error(source):
    with pytest.raises(TextError, match="the chat template refused the messages"):
        template(source).render(user("a"))


@pytest.mark.parametrize(
    "source",
    [
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ ''.join.__self__.__class__.__mro__ }}",
        "{% for i in range(10000000) %}a{% endfor %}",
    ],
)
def test_sandbox_blocks_python_internals_mutation_and_huge_ranges(source):
    with pytest.raises(TextError):
        template(source).render(user("a"))


@pytest.mark.parametrize(
    "source",
    ["{{ '{0.__class__}'.format(messages) }}", "{{ raise_exception.__globals__ }}", "{{ lipsum.__globals__ }}"],
)
def test_sandbox_shows_nothing_of_python_internals(source):
    assert template(source).render(user("a")) == ""


def test_template_that_does_not_compile_is_refused_on_construction():
    with pytest.raises(TextError, match="cannot be compiled"):
        template("{% for %}")


def test_runaway_output_is_cut_off(monkeypatch):
    monkeypatch.setattr(chat, "MAX_CHARS", 1000)
    loop = template("{% for i in range(400) %}{{ messages[0].content }}{% endfor %}")
    assert loop.render(user("ab")) == "ab" * 400
    with pytest.raises(TextError, match="more than 1000 characters"):
        loop.render(user("abc"))


def test_tojson_keeps_order_letters_and_html():
    assert template("{{ messages[0].content | tojson }}").render(user("<é&'>")) == '"<é&\'>"'


def test_strftime_now_is_the_local_date():
    before = datetime.now().strftime("%Y")
    assert template("{{ strftime_now('%Y') }}").render(user("a")) in (before, datetime.now().strftime("%Y"))


@pytest.mark.parametrize("message", [{"role": "user", "content": None}, {"role": "user"}])
def test_no_content_is_the_empty_string(message):
    assert template("[{{ messages[0].content }}]").render([message]) == "[]"


@pytest.mark.parametrize(
    "test", ["message['content'] is none", "message.content is not none", "message.content == none"]
)
@pytest.mark.parametrize("fields", [{"content": None}, {"content": ""}, {}])
def test_calls_without_text_have_no_content_where_the_template_asks_for_none(test: str, fields: dict[str, Any]) -> None:
    called, answered = "{{ message.tool_calls[0].function.name }}", "[{{ message.content }}]"
    first, second = (answered, called) if "not" in test else (called, answered)
    source = f"{{% for message in messages %}}{{% if {test} %}}{first}{{% else %}}{second}{{% endif %}}{{% endfor %}}"
    calls = {"role": "assistant", "tool_calls": [CALL], **fields}
    texts = [{"role": "user", "content": "a"}, {"role": "assistant", **fields}, {"role": "assistant", "content": "b"}]
    assert template(source).render([*texts, calls, calls | {"content": "c"}]) == "[a][][b]f[c]"
    with_text = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    assert template(with_text).render([calls]) == "[]"


@pytest.mark.parametrize("calls", [[], None])
def test_tool_calls_that_are_none_are_left_out(calls: Any) -> None:
    source = (
        "{% if 'tool_calls' in messages[0] %}"
        "{% if messages[0].tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
        "{% endif %}{{ messages[0].content }}"
    )
    assert template(source).render([{"role": "assistant", "content": "a", "tool_calls": calls}]) == "a"
    with pytest.raises(TextError, match="one call at a time"):
        template(source).render([{"role": "assistant", "content": "a", "tool_calls": [CALL, CALL]}])


def test_text_parts_are_joined_unless_the_template_loops_over_content():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert template("{{ messages[0].content }}").render(user(parts)) == "one\ntwo"
    for iterated in ("message.content", "message['content']", "message.content | selectattr('type')"):
        source = "{% for message in messages %}{% for part in ITERATED %}<{{ part.text }}>{% endfor %}{% endfor %}"
        assert template(source.replace("ITERATED", iterated)).render(user(parts)) == "<one><two>"


def test_a_template_sees_every_part_that_is_text_as_a_text_part():
    parts = [
        {"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"},
        {"type": "refusal", "refusal": "c"}, "d",
    ]  # fmt: skip
    assert template("{{ messages[0].content }}").render(user(parts)) == "a\nb\nc\nd"
    source = "{% for part in messages[0].content %}{{ part.type }} {{ part.text }},{% endfor %}"
    assert template(source).render(user(parts)) == "text a,text b,text c,text d,"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([{"type": "image_url", "image_url": {}}], r"messages\[0\]\.content: .* text parts only"),
        ([{"type": "text"}], r"messages\[0\]\.content: .* text parts only"),
        (["a", 3], r"messages\[0\]\.content must be a string or a list"),
        (3, r"messages\[0\]\.content must be a string or a list"),
    ],
)
def test_content_that_the_template_cannot_take_is_named(content, match):
    with pytest.raises(TextError, match=match):
        template(CHATML).render(user(content))


def test_developer_becomes_system_where_the_template_does_not_know_it():
    messages = [{"role": "developer", "content": "a"}]
    assert template("{{ messages[0].role }}").render(messages) == "system"
    assert template("{# developer #}{{ messages[0].role }}").render(messages) == "developer"
    assert messages == [{"role": "developer", "content": "a"}]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"b": 1, "a": "é"}', '{"b": 1, "a": "é"}'),
        ("", "{}"),
        (None, "{}"),
        ("{broken", '"{broken"'),
        ("[1]", '"[1]"'),
        ({"a": 1}, '{"a": 1}'),
    ],
)
def test_tool_call_arguments_given_as_json_text_become_the_object(arguments, expected):
    source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    assert template(source).render([{"role": "assistant", "content": None, "tool_calls": [call]}]) == expected


@pytest.mark.parametrize("arguments", ['{"b":1,"a":"é"}', {"b": 1, "a": "é"}])
def test_tool_call_arguments_are_text_for_templates_that_take_them_for_text(arguments):
    source = (
        "{% set arguments = messages[0].tool_calls[0].function.arguments %}"
        "{{ '```' + arguments + '```' }} {{ arguments }} {{ 'x' ~ arguments }} {{ arguments.b }}"
        "{{ arguments is string }}"
    )
    text = arguments if isinstance(arguments, str) else '{"b": 1, "a": "é"}'
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    rendered = template(source).render([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert rendered == f"```{text}``` {text} x{text} 1False"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_is_found_under_each_of_its_names(name):
    source = "{{ messages[0].reasoning_content }} {{ messages[0].reasoning }} {{ messages[0].thinking }}"
    assert template(source).render([{"role": "assistant", "content": "a", name: "hm"}]) == "hm hm hm"


def test_request_variables_reach_the_template():
    kwargs = {"enable_thinking": False, "effort": "low", "n": 2, "x": 0.5, "none": None}
    source = "{{ enable_thinking }} {{ effort }} {{ n }} {{ x }} {{ none }}"
    assert template(source).render(user("a"), kwargs=kwargs) == "False low 2 0.5 None"


@pytest.mark.parametrize(
    "name",
    ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token", "pad_token",
     "image_token", "raise_exception", "strftime_now", "range", "namespace"],
)  # fmt: skip
def test_request_variables_under_taken_names_are_refused_by_name(name):
    with pytest.raises(NameTaken, match=f"chat_template_kwargs: '{name}'"):
        template("a", image_token="<image>").render(user("a"), kwargs={name: True})


def test_options_of_apply_chat_template_are_no_variables():
    from transformers import PreTrainedTokenizerBase

    options = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"self", "kwargs"}
    assert {"tokenize", "chat_template", "return_dict", "return_tensors"} < options
    for name in options:
        with pytest.raises(NameTaken, match=f"chat_template_kwargs: '{name}'"):
            template("a").render(user("a"), kwargs={name: False})


@pytest.mark.parametrize("name", ["_private", "a-b", "self.x", ""])
def test_request_variables_under_names_that_are_none_are_refused_by_name(name):
    with pytest.raises(TextError, match=f"chat_template_kwargs: '{name}'") as error:
        template("a").render(user("a"), kwargs={name: True})
    assert not isinstance(error.value, NameTaken)


@pytest.mark.parametrize("value", [[1], {"a": 1}, b"x"])
def test_request_variables_must_be_scalars(value):
    with pytest.raises(TextError, match="'x' must be a string, number, boolean or null"):
        template("a").render(user("a"), kwargs={"x": value})


def test_tool_use_template_serves_requests_with_tools(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    write_json(tmp_path, "tokenizer_config.json", {"chat_template": named})
    loaded = ChatTemplate.load(str(tmp_path))
    assert loaded.render(user("a")) == "plain"
    assert loaded.render(user("a"), tools=[]) == "plain"
    assert loaded.render(user("a"), tools=[TOOL]) == "tools"


@pytest.mark.parametrize("as_files", [True, False])
@pytest.mark.parametrize("names", [("default", "tool_use", "rag"), ("default", "rag"), ("default",)])
def test_named_templates_are_chosen_as_transformers_does_from_what_it_writes(tmp_path, names, as_files):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(str(write_byte_tokenizer(tmp_path / "from")))
    theirs.chat_template = {name: f"{name}: {{{{ messages[0].content }}}}é" for name in names}
    theirs.save_pretrained(str(tmp_path / "to"), save_jinja_files=as_files)
    assert (tmp_path / "to/additional_chat_templates/rag.jinja").is_file() is (as_files and "rag" in names)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "to"))
    ours = ChatTemplate.load(str(tmp_path / "to"))
    for tools in (None, [TOOL]):
        expected = theirs.apply_chat_template(user("a"), tokenize=False, tools=tools)
        assert ours.render(user("a"), tools=tools) == expected


def test_additional_templates_stand_beside_one_in_the_config_and_behind_a_file_of_the_user(tmp_path):
    write_json(tmp_path, "tokenizer_config.json", {"chat_template": "plain"})
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("tools")
    (tmp_path / "mine.jinja").write_text("mine")
    loaded = ChatTemplate.load(str(tmp_path))
    assert (loaded.render(user("a")), loaded.render(user("a"), tools=[TOOL])) == ("plain", "tools")
    assert ChatTemplate.load(str(tmp_path), str(tmp_path / "mine.jinja")).render(user("a"), tools=[TOOL]) == "mine"


def test_files_win_over_the_config_and_special_tokens_reach_the_template(tmp_path):
    config = {"chat_template": "config", "bos_token": {"content": "<s>"}, "eos_token": None}
    write_json(tmp_path, "tokenizer_config.json", config)
    write_json(tmp_path, "special_tokens_map.json", {"eos_token": "</s>", "image_token": "<i>"})
    assert ChatTemplate.load(str(tmp_path)).render(user("a")) == "config"
    write_json(tmp_path, "chat_template.json", {"chat_template": "{{ bos_token }}{{ eos_token }}{{ image_token }}"})
    assert ChatTemplate.load(str(tmp_path)).render(user("a")) == "<s></s><i>"
    (tmp_path / "chat_template.jinja").write_text("[{{ messages[0].content }}é]", encoding="utf-8")
    assert ChatTemplate.load(str(tmp_path)).render(user("a")) == "[aé]"


def test_model_without_a_template_points_to_completions(tmp_path):
    write_byte_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(TextError, match="no chat template: use /v1/completions"):
        ChatTemplate.load(str(tmp_path)).render(user("a"))


@pytest.mark.parametrize("found", [3, [{"name": "default"}], [1]])
def test_malformed_chat_template_is_refused(tmp_path, found):
    write_json(tmp_path, "tokenizer_config.json", {"chat_template": found})
    with pytest.raises(TextError, match="chat_template must be a string or a list"):
        ChatTemplate.load(str(tmp_path))


def test_a_file_takes_the_place_of_the_model_s_own_template(tmp_path):
    write_byte_tokenizer(tmp_path)
    (tmp_path / "mine.jinja").write_text("[{{ messages[0].content }}é{{ bos_token }}]", encoding="utf-8")
    template = ChatTemplate.load(str(tmp_path), str(tmp_path / "mine.jinja"), {"bos_token": "<s>"})
    assert template.render(user("a")) == "[aé<s>]"
    with pytest.raises(TextError, match=r"chat template .*none\.jinja cannot be read: .*No such file"):
        ChatTemplate.load(str(tmp_path), str(tmp_path / "none.jinja"))


def test_documents_go_where_a_template_has_a_place_for_them() -> None:
    template = ChatTemplate(
        {"default": "{% for d in documents or [] %}{{ d.text }}|{% endfor %}{{ messages[0].content }}"}, {}
    )
    messages = [{"role": "user", "content": "hi"}]
    assert template.render(messages, documents=[{"text": "a"}, {"text": "b"}]) == "a|b|hi"
    assert template.render(messages) == "hi"
    with pytest.raises(TextError, match="documents: this model's chat template has no place"):
        ChatTemplate({"default": "{{ messages[0].content }}"}, {}).render(messages, documents=[{"text": "a"}])


def test_variables_that_a_template_does_not_read_never_reach_it() -> None:
    source = "{%- if deep is not defined %}{% set deep = 'unset' %}{% endif -%}{{ deep }}{{ self.wide }}"
    template = ChatTemplate({"default": source}, {})
    messages = [{"role": "user", "content": "hi"}]
    assert template.render(messages, kwargs={"deep": 3, "wide": "x"}) == "3"
    assert template.render(messages, kwargs={"wide": "x"}) == "unset"
