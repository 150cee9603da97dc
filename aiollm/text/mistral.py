"""The chat template of Mistral's models that come with tekken.json and without a template."""

from pathlib import Path

import msgspec

TEKKEN = """
{%- set place = namespace(tools=none) %}
{%- for message in messages if message.role == 'user' %}
    {%- if version < 13 or loop.first %}{% set place.tools = message %}{% endif %}
{%- endfor %}
{%- if tools and place.tools is none %}{{ raise_exception("tools need a message of the role user") }}{% endif %}
{{- '<s>' }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{ '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}
    {%- elif message.role == 'user' %}
        {%- if tools and message is sameas place.tools %}
            {{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- set id = call.id if call.id != 'null' else '' %}
            {%- set arguments = call.function.arguments | tojson %}
            <calls>
        {%- endfor %}
        {{- '</s>' }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]' }}
        {{- message.tool_call_id + '[TOOL_CONTENT]' if version < 13 }}
        {{- message.content + '[/TOOL_RESULTS]' }}
    {%- else %}{{ raise_exception("the role " + message.role + " needs a template of its own: --chat_template") }}
    {%- endif %}
{%- endfor %}"""
"""Reads the tokenizer's version: tools stand before the last user's turn, from 13 on before the first. In the place of
<calls> comes how calls are written."""
LISTED = """
                {{- '[TOOL_CALLS][' if loop.first else ', ' }}
                {{- '{"name": ' + call.function.name | tojson + ', "arguments": ' + arguments }}
                {{- ', "id": ' + id | tojson if id }}
                {{- '}]' if loop.last else '}' }}"""
"""Calls are one JSON list, from version 11 on each on its own. A template has the text of one way only: by that it is
told how the model writes them."""
SINGLE = """
                {{- '[TOOL_CALLS]' + call.function.name }}
                {{- '[CALL_ID]' + id if id and version < 13 }}
                {{- '[ARGS]' + arguments }}"""


class _Config(msgspec.Struct):
    version: str = ""


class _Head(msgspec.Struct):
    """The rest of a tekken.json, its vocabulary, is passed over."""

    config: _Config


def template(folder: str) -> str | None:
    """For versions of 7 and higher; None for others, and without tekken.json."""
    path = Path(folder, "tekken.json")
    try:
        version = msgspec.json.decode(path.read_bytes(), type=_Head).config.version if path.is_file() else ""
    except msgspec.MsgspecError:
        return None  # whoever reads the vocabulary tells what is wrong
    text = version.removeprefix("v").partition("m")[0]
    number = int(text) if text.isdigit() else 0
    written = TEKKEN.replace("<calls>", LISTED if number < 11 else SINGLE)
    return f"{{%- set version = {number} %}}{written}" if number >= 7 else None
