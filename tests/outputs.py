"""Outputs as models write them, and what they say: for parsers alone, and for a server whose worker repeats them."""

from typing import Any, NamedTuple

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "detail": {"type": "object"}},
}
FUNCTIONS: dict[str, dict[str, Any]] = {"get_weather": WEATHER, "now": {}, "write_file": {
    "type": "object", "properties": {"path": {"type": "string"}, "text": {"type": "string"}}}}  # fmt: skip
PARIS, PARIS_3 = '{"city": "Paris"}', '{"city": "Paris", "days": 3}'
NOW = ("now", "{}")
WILD = r"""{"path": "\u00e9.py", "text": "f():\n  return {\"a\": [1, {}], '</tool_call>': \"\\\\\"}\n# <tool_call>{"}"""
NESTED = '{"city":"東京🙂","detail":{"a":[{"b":{}},[[]],"]}"],"c":-1.5e3,"d":null,"e":true}}'


class Output(NamedTuple):
    calls: str
    style: str
    text: str
    said: tuple[str, str, list[tuple[str, str]]]
    """Reasoning, content and calls."""
    prompt: str = "<|assistant|>\n"
    complete: bool = True
    """Whether the last call is, if there is one."""


def deepseek(*calls: str) -> str:
    inner = "\n".join(f"<｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜>" for call in calls)
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def v3(name: str, arguments: str) -> str:
    return f"function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def coder(name: str, **values: str) -> str:
    pairs = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{pairs}</function>\n</tool_call>"


def glm(name: str, **values: str) -> str:
    pairs = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in values.items())
    return f"<tool_call>{name}\n{pairs}</tool_call>"


OUTPUTS = {
    # Plain text
    "empty": Output("hermes", "think", "", ("", "", [])),
    "text": Output("hermes", "think", "Hello, <b>you</b> & 🙂 <tool\n", ("", "Hello, <b>you</b> & 🙂 <tool\n", [])),
    "white space": Output("hermes", "think", " \n\n ", ("", " \n\n ", [])),
    "no formats": Output("none", "none", hermes(*NOW), ("", hermes(*NOW), [])),
    # Hermes
    "hermes": Output("hermes", "none", hermes("get_weather", PARIS), ("", "", [("get_weather", PARIS)])),
    "hermes, text around": Output(
        "hermes", "none", f"Let me look.\n\n{hermes('get_weather', PARIS)}\n\nDone.",
        ("", "Let me look.Done.", [("get_weather", PARIS)]),
    ),
    "hermes, several": Output(
        "hermes", "none", f"{hermes('get_weather', PARIS_3)}\n{hermes(*NOW)}\n{hermes('write_file', WILD)}",
        ("", "", [("get_weather", PARIS_3), NOW, ("write_file", WILD)]),
    ),
    "hermes, nested": Output("hermes", "none", hermes("get_weather", NESTED), ("", "", [("get_weather", NESTED)])),
    "hermes, no white space": Output(
        "hermes", "none", f'<tool_call>{{"name":"now","arguments":{PARIS}}}</tool_call>', ("", "", [("now", PARIS)])
    ),
    "hermes, other order": Output(
        "hermes", "none", f'<tool_call>{{"arguments": {PARIS_3}, "id": "x", "name": "get_weather"}}</tool_call>',
        ("", "", [("get_weather", PARIS_3)]),
    ),
    "hermes, members behind": Output(
        "hermes", "none", f'<tool_call>{{"type": "function", "name": "now", "arguments": {PARIS}, "id": "x"}}',
        ("", "", [("now", PARIS)]),
    ),
    "hermes, without arguments": Output("hermes", "none", '<tool_call>{"name": "now"}</tool_call>', ("", "", [NOW])),
    "hermes, null": Output(
        "hermes", "none", '<tool_call>{"name": "now", "arguments": null}</tool_call>', ("", "", [NOW])
    ),
    "hermes, text of JSON": Output(
        "hermes", "none", r'<tool_call>{"name": "now", "arguments": "{\"a\": \"\u00e9\"}"}</tool_call>',
        ("", "", [("now", '{"a": "é"}')]),
    ),
    "hermes, escaped name": Output(
        "hermes", "none", r'<tool_call>{"n\u0061me": "n\u006fw", "arguments": {}}</tool_call>', ("", "", [NOW])
    ),
    "hermes, arguments are no JSON": Output(
        "hermes", "none", '<tool_call>{"name": "now", "arguments": {a: nil, "b": [}]}}</tool_call>.',
        ("", "}</tool_call>.", [("now", '{a: nil, "b": [}]')]),
    ),
    "hermes, one brace too many": Output(
        "hermes", "none", '<tool_call>{"name": "now", "arguments": {}}}</tool_call>', ("", "}</tool_call>", [NOW])
    ),
    "hermes, not closed": Output(
        "hermes", "none", f'<tool_call>{{"name": "now", "arguments": {{}}}}{hermes(*NOW)}', ("", "", [NOW, NOW])
    ),
    "hermes, no JSON": Output(
        "hermes", "none", f"<tool_call>now()</tool_call> {hermes(*NOW)}", ("", "<tool_call>now()</tool_call>", [NOW])
    ),
    "hermes, a mark in text": Output(
        "hermes", "none", f"Write <tool_call> <tool_call>{hermes(*NOW)}", ("", "Write <tool_call> <tool_call>", [NOW])
    ),
    "hermes, no name": Output(
        "hermes", "none", '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        ("", '<tool_call>{"arguments": {"a": 1}}</tool_call>', []),
    ),
    "hermes, name is none": Output(
        "hermes", "none", '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        ("", '<tool_call>{"name": 5, "arguments": {}}</tool_call>', []),
    ),
    "hermes, half a surrogate": Output(
        "hermes", "none", r'<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>',
        ("", r'<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>', []),
    ),
    "hermes, cut in the mark": Output("hermes", "none", "ok <tool_ca", ("", "ok <tool_ca", [])),
    "hermes, cut in the name": Output(
        "hermes", "none", 'ok <tool_call>\n{"name": "get_w', ("", 'ok <tool_call>\n{"name": "get_w', [])
    ),
    "hermes, cut in the arguments": Output(
        "hermes", "none", hermes("write_file", WILD)[:100],
        ("", "", [("write_file", WILD[:100 - len(hermes("write_file", "")) + len("}\n</tool_call>")])]),
        complete=False,
    ),
    "hermes, cut behind the arguments": Output(
        "hermes", "none", '<tool_call>{"name": "now", "arguments": {}', ("", "", [NOW])
    ),
    # Reasoning
    "think": Output("hermes", "think", "<think>\nHm, hm.\n</think>\n\nYes. ", ("Hm, hm.", "Yes. ", [])),
    "think, opened by the prompt": Output(
        "hermes", "think", "Hm </thin k>\n</think>\n\nYes.", ("Hm </thin k>", "Yes.", []), "<|assistant|><think>\n"
    ),
    "think, opened twice": Output(
        "hermes", "think", "\n<think>Hm</think>Yes", ("Hm", "Yes", []), "<|assistant|><think>\n"
    ),
    "think, closed by the prompt": Output(
        "hermes", "think", "Yes.</think>", ("", "Yes.</think>", []), "<think>\n\n</think>\n\n"
    ),
    "think, not at the beginning": Output(
        "hermes", "think", "A <think>tag</think>", ("", "A <think>tag</think>", [])
    ),
    "think, empty": Output("hermes", "think", "<think>\n\n</think>\n\nYes", ("", "Yes", [])),
    "think, cut": Output("hermes", "think", "<think>Hm\n\n</thi", ("Hm\n\n</thi", "", [])),
    "think, and a call": Output(
        "hermes", "think", f"<think>\nNot <tool_call> yet\n</think>\n\n{hermes('get_weather', PARIS)}",
        ("Not <tool_call> yet", "", [("get_weather", PARIS)]),
    ),
    "think, without calls": Output("none", "think", "<think>a</think>\n<tool_call>", ("a", "<tool_call>", [])),
    "deepseek_r1, no tag": Output("none", "deepseek_r1", "Hm.\n</think>\n\nYes", ("Hm.", "Yes", [])),
    "deepseek_r1, closed by the prompt": Output("none", "deepseek_r1", "Yes", ("", "Yes", []), "<think></think>"),
    "mistral, thinking": Output("mistral", "mistral", "[THINK]Hm[/THINK]Yes", ("Hm", "Yes", [])),
    # Llama 3
    "llama3": Output(
        "llama3", "none", f'{{"name": "get_weather", "parameters": {PARIS}}}', ("", "", [("get_weather", PARIS)])
    ),
    "llama3, tag": Output(
        "llama3", "none", f'Well. <|python_tag|>{{"name": "other", "parameters": {NESTED}}}',
        ("", "Well.", [("other", NESTED)]),
    ),
    "llama3, several": Output(
        "llama3", "none",
        f'<|python_tag|>{{"type": "function", "name": "now", "parameters": {{}}}}; '
        f'{{"type": "function", "function": "get_weather", "parameters": {PARIS}}}',
        ("", "", [NOW, ("get_weather", PARIS)]),
    ),
    "llama3, unknown name": Output(
        "llama3", "none", '{"name": "Bob", "parameters": {}}', ("", '{"name": "Bob", "parameters": {}}', [])
    ),
    "llama3, other JSON": Output(
        "llama3", "none", '\n{"a": {"name": "now"}}', ("", '\n{"a": {"name": "now"}}', [])
    ),
    "llama3, a name alone": Output("llama3", "none", '{"name": "now"}', ("", '{"name": "now"}', [])),
    "llama3, JSON in text": Output(
        "llama3", "none", 'Use {"name": "now", "parameters": {}}', ("", 'Use {"name": "now", "parameters": {}}', [])
    ),
    "llama3, built-in call": Output(
        "llama3", "none", '<|python_tag|>brave_search.call(query="x")',
        ("", '<|python_tag|>brave_search.call(query="x")', []),
    ),
    "llama3, text behind": Output(
        "llama3", "none", '{"name": "now", "parameters": {}}; so', ("", "; so", [NOW])
    ),
    "llama3, cut": Output(
        "llama3", "none", '{"name": "now", "parameters": {"a": "b\\', ("", "", [("now", '{"a": "b\\')]), complete=False
    ),
    # Mistral
    "mistral": Output(
        "mistral", "none", f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}]',
        ("", "", [("get_weather", PARIS)]),
    ),
    "mistral, several": Output(
        "mistral", "none", f'Sure.[TOOL_CALLS][{{"name":"now","arguments":{{}}}}, {{"name":"f","arguments":{NESTED}}}]',
        ("", "Sure.", [NOW, ("f", NESTED)]),
    ),
    "mistral, one object": Output(
        "mistral", "none", '[TOOL_CALLS]{"name":"now","arguments":{}}', ("", "", [NOW])
    ),
    "mistral, by name": Output(
        "mistral", "none", f"a[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{{}}",
        ("", "a", [("get_weather", PARIS), NOW]),
    ),
    "mistral, no mark of arguments": Output(
        "mistral", "none", f"[TOOL_CALLS]get_weather{PARIS}", ("", "", [("get_weather", PARIS)])
    ),
    "mistral, no call": Output(
        "mistral", "none", "[TOOL_CALLS]get_weather(Paris) [TOOL_CALLS][5]",
        ("", "[TOOL_CALLS]get_weather(Paris) [TOOL_CALLS][5]", []),
    ),
    "mistral, list not closed": Output(
        "mistral", "none", '[TOOL_CALLS][{"name":"now","arguments":{}}, oops', ("", ", oops", [NOW])
    ),
    # DeepSeek
    "deepseek, V3": Output(
        "deepseek", "none", "Sure." + deepseek(v3("get_weather", PARIS), v3("now", "{}")),
        ("", "Sure.", [("get_weather", PARIS), NOW]),
    ),
    "deepseek, V3.1": Output(
        "deepseek", "think",
        "Hm</think>" + deepseek(f"get_weather<｜tool▁sep｜>{NESTED}", "now<｜tool▁sep｜>{}") + "ok",
        ("Hm", "ok", [("get_weather", NESTED), NOW]), "<think>",
    ),
    "deepseek, marks missing": Output(
        "deepseek", "none", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{} so", ("", "so", [NOW])
    ),
    "deepseek, no call": Output(
        "deepseek", "none", deepseek("now()") + deepseek(v3("now", "[]")),
        ("", deepseek("now()") + deepseek(v3("now", "[]")), []),
    ),
    "deepseek, cut": Output(
        "deepseek", "none", deepseek(v3("write_file", WILD))[:-75],
        ("", "", [("write_file", WILD[:-(75 - len("\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"))])]), complete=False,
    ),
    # GLM
    "glm": Output(
        "glm", "think",
        "<think>Hm</think>\n" + glm("get_weather", city="Paris", days="3", detail='{"a": [1]}'),
        ("Hm", "", [("get_weather", '{"city": "Paris", "days": 3, "detail": {"a": [1]}}')]),
    ),
    "glm, several": Output(
        "glm", "none", "Well.\n" + glm("now") + "\n" + glm("write_file", path='a"b', text='x <b>\n\\"</tool_call>é🙂'),
        ("", "Well.", [NOW, ("write_file", r'{"path": "a\"b", "text": "x <b>\n\\\"</tool_call>é🙂"}')]),
    ),
    "glm, on one line": Output(
        "glm", "none", "<tool_call>now<arg_key>a</arg_key><arg_value>true</arg_value></tool_call>",
        ("", "", [("now", '{"a": true}')]),
    ),
    "glm, number as a string": Output(
        "glm", "none", glm("get_weather", city="75001"), ("", "", [("get_weather", '{"city": "75001"}')])
    ),
    "glm, unknown type": Output(
        "glm", "none", glm("other", a="x y", b="1 2"), ("", "", [("other", '{"a": "x y", "b": "1 2"}')])
    ),
    "glm, no call": Output(
        "glm", "none", "<tool_call>get_weather(Paris)</tool_call>",
        ("", "<tool_call>get_weather(Paris)</tool_call>", []),
    ),
    "glm, broken within": Output(
        "glm", "none", "<tool_call>now\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\noops",
        ("", "<arg_key>b</arg_key>\noops", [("now", '{"a": 1}')]),
    ),
    "glm, tags within": Output(
        "glm", "none", glm("get_weather", detail='\n{"a</arg_value>": ["\\"</arg_value>"]}', city='["</arg_value>'),
        (
            "", '</arg_value>\n</tool_call>',
            [("get_weather", r'{"detail": {"a</arg_value>": ["\"</arg_value>"]}, "city": "[\""}')],
        ),
    ),
    "glm, cut": Output(
        "glm", "none", '<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Par"is</arg',
        ("", "", [("get_weather", '{"city": "Par\\"is</arg')]), complete=False,
    ),
    # Qwen 3 Coder
    "coder": Output(
        "qwen3_coder", "none",
        "Well.\n" + coder("get_weather", city="Pa\nris", days="3", detail='{"a": [1]}') + "\n" + coder("now"),
        ("", "Well.", [("get_weather", '{"city": "Pa\\nris", "days": 3, "detail": {"a": [1]}}'), NOW]),
    ),
    "coder, code": Output(
        "qwen3_coder", "none", coder("write_file", path="a<b>", text='if a < b:\n\n\treturn "</param>"\n'),
        ("", "", [("write_file", r'{"path": "a<b>", "text": "if a < b:\n\n\treturn \"</param>\"\n"}')]),
    ),
    "coder, bare": Output(
        "qwen3_coder", "none", "a <function=now><parameter=x>true</parameter></function> b",
        ("", "ab", [("now", '{"x": true}')]),
    ),
    "coder, no call": Output(
        "qwen3_coder", "none", "<tool_call>now</tool_call> <function=now()>",
        ("", "<tool_call>now</tool_call> <function=now()>", []),
    ),
    "coder, broken within": Output(
        "qwen3_coder", "none", "<function=now>\n<parameter=a>\n1\n</parameter>\noops</function>",
        ("", "oops</function>", [("now", '{"a": 1}')]),
    ),
    "coder, cut": Output(
        "qwen3_coder", "none", "<tool_call>\n<function=write_file>\n<parameter=text>\na\n</par",
        ("", "", [("write_file", '{"text": "a\\n</par')]), complete=False,
    ),
    # Pythonic
    "pythonic": Output(
        "pythonic", "none", "[get_weather(city='Par\\'is', days=-3), now()]",
        ("", "", [("get_weather", '{"city": "Par\'is", "days": -3}'), NOW]),
    ),
    "pythonic, marks": Output(
        "pythonic", "none", '<|python_start|>[write_file(path="a)](", text=\'\\u00e9\\n"\')]<|python_end|> so',
        ("", "so", [("write_file", r'{"path": "a)](", "text": "é\n\""}')]),
    ),
    "pythonic, values": Output(
        "pythonic", "none", "[now(a=[1, (2.5,)], b={'c': None, 'd': True}, e=\"東京\")]",
        ("", "", [("now", '{"a": [1, [2.5]], "b": {"c": null, "d": true}, "e": "東京"}')]),
    ),
    "pythonic, text": Output("pythonic", "none", "[1] now() is it", ("", "[1] now() is it", [])),
    "pythonic, unknown name": Output("pythonic", "none", "[f(x=1)]", ("", "[f(x=1)]", [])),
    "pythonic, no literals": Output("pythonic", "none", "[now(a=f(1))]", ("", "[now(a=f(1))]", [])),
    "pythonic, by position": Output("pythonic", "none", "[now(1)]", ("", "[now(1)]", [])),
    "pythonic, spread": Output("pythonic", "none", "[now(**{'a': 1})]", ("", "[now(**{'a': 1})]", [])),
    "pythonic, half a surrogate": Output(
        "pythonic", "none", r"[now(a='\ud800')]", ("", r"[now(a='\ud800')]", [])
    ),
    "pythonic, cut": Output("pythonic", "none", "[now(), now(a='b", ("", ", now(a='b", [NOW])),
}  # fmt: skip
"""By name. Content is joined from what stands before, between and behind the calls."""
