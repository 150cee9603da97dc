"""A model's chat template: a message list becomes the text that the model was trained on.

Messages are in OpenAI's form. Before the template sees them:

- content None or missing becomes ""; where the template compares content with none, no text beside tool calls is None;
- parts of content that are text under another name, or bare, become text parts;
- content given as a list of text parts is joined with newlines, unless the template itself loops over content;
- the role "developer" becomes "system", unless the template mentions "developer";
- tool calls that are none are left out;
- arguments of tool calls become an object that reads as its JSON text where a template takes it for text;
- reasoning is put under each of the names that templates read it from.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import msgspec

from aiollm.text import mistral
from aiollm.text.bounds import MAX_CHARS
from aiollm.text.folder import TextError, read_json, special_tokens
from aiollm.text.sandbox import Sandbox
from aiollm.text.template_tree import compares_content_with_none, loops_over_content

MAX_FORM = 1000  # characters of a date's form, each of which may become many
ADDITIONAL = "additional_chat_templates"  # a folder of NAME.jinja
# Stands at the end of the message to be continued, so that its place in the rendered text is known. The blank at its
# end tells whether the template trims content.
CONTINUE_MARK = "<aiollm:continue-here> "
PLACES = {"documents": "documents", "role_settings": "role_setting", "character_settings": "character_settings"}
"""Variables of templates for what a request brings."""
ARGUMENTS = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
OPTIONS = frozenset(
    {
        "chat_template", "conversation", "max_length", "padding", "return_assistant_tokens_mask", "return_dict",
        "return_tensors", "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "truncation",
    }
)  # fmt: skip
"""What transformers' apply_chat_template takes beside them: under these names no template gets a variable."""
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
SPECIAL_TOKEN_NAMES = frozenset(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class NameTaken(TextError):
    """A request's template variable has a name that only the server gives a value."""


class ChatTemplate:
    """The compiled templates of one model: "default", and perhaps "tool_use" for requests with tools."""

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, str]) -> None:
        """`sources`: template text by name; `variables`: what templates find under bos_token, eos_token and so on.

        Raises TextError if a template cannot be compiled.
        """
        environment = _environment()
        try:
            self._templates = {name: _Compiled(environment, source) for name, source in sources.items()}
        except jinja2.TemplateError as error:
            raise TextError(f"the model's chat template cannot be compiled: {error}") from error
        self.source = "\n".join(sources.values())
        """The text of all of them."""
        self._variables = dict(variables)
        self._reserved = ARGUMENTS | OPTIONS | SPECIAL_TOKEN_NAMES | variables.keys() | environment.globals.keys()

    @classmethod
    def load(cls, folder: str, file: str = "", named: Mapping[str, str] = MappingProxyType({})) -> "ChatTemplate":
        """The templates of a model folder: chat_template.jinja, else chat_template.json, else tokenizer_config.json,
        and those in additional_chat_templates under the names of their files.

        The text in `file` stands in for all of them. `named` are special tokens that the folder's JSON files lack.
        Without any template `render` says so. Raises TextError for a file that is corrupt.
        """
        config = read_json(folder, "tokenizer_config.json")
        path = Path(file or Path(folder, "chat_template.jinja"))
        if file or path.is_file():
            found: Any = _text(path)
        else:
            found = read_json(folder, "chat_template.json").get("chat_template") or config.get("chat_template")
        tokens = special_tokens(config, read_json(folder, "special_tokens_map.json"), named)
        others = [] if file else sorted(Path(folder, ADDITIONAL).glob("*.jinja"))
        sources = _sources(found or mistral.template(folder)) | {path.stem: _text(path) for path in others}
        return cls(sources, tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        role_settings: Mapping[str, Any] | None = None,
        character_settings: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`.

        `add_generation_prompt` opens the assistant's turn at the end; `continue_final_message` instead leaves the
        last message open, so that the model goes on with it. `documents` are what the answer should rest on, and the
        two settings, which are LightLLM's, whom the model plays, for templates that have a place for them. `kwargs`
        are the request's own template variables: scalars only, under names that are not taken; those that the template
        does not read are left out.

        Raises TextError, with the template's own words where it has refused the messages, and NameTaken for `kwargs`.
        """
        template = self._choose(bool(tools))
        given = {"documents": documents, "role_settings": role_settings, "character_settings": character_settings}
        for name, value in given.items():
            if value and PLACES[name] not in template.reads:
                raise TextError(f"{name}: this model's chat template has no place for them")
        chat = [template.prepared(index, message) for index, message in enumerate(messages)]
        if continue_final_message:
            chat[-1:] = [_marked(chat)]
        text = template.render(
            {
                **self._variables,
                **{name: value for name, value in self._checked(kwargs or {}).items() if name in template.reads},
                "messages": chat,
                "tools": list(tools) if tools else None,
                "documents": None,
                **{PLACES[name]: value for name, value in given.items() if value},
                "add_generation_prompt": add_generation_prompt and not continue_final_message,
            }
        )
        return _up_to_mark(text) if continue_final_message else text

    def _choose(self, with_tools: bool) -> "_Compiled":
        for name in ("tool_use", "default") if with_tools else ("default",):
            if name in self._templates:
                return self._templates[name]
        raise TextError(
            "this model has no chat template: use /v1/completions with the whole prompt as text, or "
            "start the server with --chat_template FILE"
        )

    def _checked(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        for name, value in kwargs.items():
            if name in self._reserved or name.startswith("_") or not name.isidentifier():
                error = NameTaken if name in self._reserved else TextError
                raise error(f"chat_template_kwargs: {name!r} is reserved or is not a name that a template can read")
            if value is not None and not isinstance(value, str | int | float | bool):
                raise TextError(f"chat_template_kwargs: {name!r} must be a string, number, boolean or null")
        return kwargs


class _Compiled:
    """One template, and what its text tells of the messages it wants."""

    def __init__(self, environment: jinja2.Environment, source: str) -> None:
        self._template = environment.from_string(source)
        tree = environment.parse(source)
        self.reads = frozenset(name.name for name in tree.find_all(jinja2.nodes.Name) if name.ctx == "load")
        """Names of variables whose values matter."""
        self._loops_over_content = loops_over_content(tree)
        self._knows_none = compares_content_with_none(tree)
        self._knows_developer = "developer" in source

    def prepared(self, index: int, message: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of message number `index` in the form described at the top of this file."""
        reasoning = next((message[name] for name in REASONING_NAMES if message.get(name) is not None), None)
        aliases = {} if reasoning is None else dict.fromkeys(REASONING_NAMES, reasoning)
        result = {**message, **aliases, "content": self._content(index, message)}
        if message.get("role") == "developer" and not self._knows_developer:
            result["role"] = "system"
        if isinstance(calls := message.get("tool_calls"), list):
            result["tool_calls"] = [_with_arguments(call) for call in calls]
        if not calls:
            result.pop("tool_calls", None)
        return result

    def render(self, variables: Mapping[str, Any]) -> str:
        parts, size = [], 0
        try:
            for part in self._template.generate(variables):
                parts.append(part)
                size += len(part)
                if size > MAX_CHARS:
                    raise TextError(f"the chat template wrote more than {MAX_CHARS} characters")
        except TextError:
            raise
        # A template is a program run on what the user sent: whatever it raises says that the two do not fit.
        except Exception as error:
            raise TextError(f"the chat template refused the messages: {error}") from error
        return "".join(parts)

    def _content(self, index: int, message: Mapping[str, Any]) -> Any:
        content = message.get("content")
        if content is None or content == "":
            only_calls = message.get("role") == "assistant" and message.get("tool_calls")
            return None if only_calls and self._knows_none else ""
        if isinstance(content, str):
            return content
        if not isinstance(content, list) or not all(isinstance(part, dict | str) for part in content):
            raise TextError(f"messages[{index}].content must be a string or a list of parts")
        content = list(map(_plain_part, content))
        if self._loops_over_content:
            return [dict(part) for part in content]
        texts = [part.get("text") for part in content if part.get("type") == "text"]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise TextError(f"messages[{index}].content: this model's chat template takes text parts only")
        return "\n".join(texts)


def _plain_part(part: Any) -> Any:
    """A part of a message; one that is text is of the type text."""
    match part:
        case str(text) | {"type": "input_text" | "output_text", "text": text} | {"type": "refusal", "refusal": text}:
            return {"type": "text", "text": text}
    return part


class _Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks what is trained on; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it as an instance variable

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> jinja2.Environment:
    """Names, filters and white space as transformers gives them to chat templates."""
    extensions = [_Generation, jinja2.ext.loopcontrols]
    environment = Sandbox({"tojson": _tojson}, trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes <, > and & for HTML and sorts keys, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > MAX_FORM:
        raise jinja2.TemplateError(f"what strftime_now makes of a form of {len(form)} characters is too large")
    return datetime.now().strftime(form)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"the chat template {path} cannot be read: {error}") from error


def _sources(found: Any) -> dict[str, str]:
    """Templates by name, from the three forms in use: absent, one text, a list of {name, template}."""
    if not found:
        return {}
    if isinstance(found, str):
        return {"default": found}
    try:
        named = msgspec.convert(found, list[dict[str, str]])
        sources = {entry["name"]: entry["template"] for entry in named}
    except (msgspec.ValidationError, KeyError) as error:
        raise TextError("chat_template must be a string or a list of {name, template}") from error
    return sources if len(sources) != 1 else {"default": next(iter(sources.values()))}


class _Arguments(dict[str, Any]):
    """Arguments of a call: an object for most templates, JSON text for those that print it or add it to text."""

    def __init__(self, values: Mapping[str, Any], text: str) -> None:
        super().__init__(values)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


def _with_arguments(call: Any) -> Any:
    """A tool call whose arguments, if they are an object or the JSON text of one, are both."""
    match call:
        case {"function": {"arguments": str() | None as text}}:
            try:
                arguments = _Arguments(msgspec.json.decode(text or "{}", type=dict[str, Any]), text or "{}")
            except msgspec.MsgspecError:
                return call
        case {"function": {"arguments": dict(values)}}:
            arguments = _Arguments(values, _tojson(values))
        case _:
            return call
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _marked(chat: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last message with CONTINUE_MARK at the end of its text."""
    match chat[-1:]:
        case [{"content": str(text)} as message]:
            return {**message, "content": text + CONTINUE_MARK}
        case [{"content": [*parts, {"text": str(text)} as last]} as message]:
            return {**message, "content": [*parts, {**last, "text": text + CONTINUE_MARK}]}
    raise TextError("continue_final_message needs a last message that ends with text")


def _up_to_mark(text: str) -> str:
    place = text.rfind(CONTINUE_MARK.rstrip())
    if place < 0:
        raise TextError("continue_final_message: the chat template leaves out the end of the last message")
    return text[:place] if text.startswith(CONTINUE_MARK, place) else text[:place].rstrip()
