"""The chat template of Mistral's models that come with tekken.json and without a template."""

from pathlib import Path

import msgspec

TEKKEN_V7 = """<s>
{%- for message in messages %}
    {%- if message.role == 'system' %}{{ '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}
    {%- elif message.role == 'user' %}{{ '[INST]' + message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' %}{{ message.content + '</s>' }}
    {%- else %}{{ raise_exception("the role " + message.role + " needs a template of its own: --chat_template") }}
    {%- endif %}
{%- endfor %}"""


class _Config(msgspec.Struct):
    version: str = ""


class _Head(msgspec.Struct):
    """The rest of a tekken.json, its vocabulary, is passed over."""

    config: _Config


def template(folder: str) -> str | None:
    """For versions of 7 and higher, whose instructions are written alike; None for others, and without tekken.json."""
    path = Path(folder, "tekken.json")
    try:
        version = msgspec.json.decode(path.read_bytes(), type=_Head).config.version if path.is_file() else ""
    except msgspec.MsgspecError:
        return None  # whoever reads the vocabulary tells what is wrong
    number = version.removeprefix("v").partition("m")[0]
    return TEKKEN_V7 if number.isdigit() and int(number) >= 7 else None
