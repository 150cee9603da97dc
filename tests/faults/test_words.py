"""What a server says of faults: nothing of its memory, folders, code or environment, and it opens no address."""

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stand import Runner, stand
from tiny_tokenizer import write_byte_tokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}
SECRETS = re.compile(
    r"llguidance|x-guidance|%json|NoExtension|\(\?:|start: |thought|\n|"
    r"0x[0-9a-f]{6,}|File \"|Traceback|line \d+, in |/home/|/root/|/tmp/|/usr/|site-packages|\.py\b|object at|<class"
)
ADMIN = [
    "/flush_cache", "/start_profile", "/stop_profile", "/drain", "/log_level", "/reset_prefix_cache", "/sleep",
    "/wake_up", "/update_weights", "/pd_register", "/kv_move_status", "/visual_register", "/load_lora_adapter",
    "/collective_rpc", "/debug", "/invocations",
]  # fmt: skip
PATHS = [
    "/..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/static/%00", "/static/..%2f..%2f..%2fetc%2fpasswd", "/%00",
    "/static//etc/passwd", "/v1/models/../../etc/passwd", "/v1/models/..%2f..%2fx",
]  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "strin"}}}
GRAMMARS: list[Any] = [
    {"guided_regex": "[a"}, {"guided_regex": "(?=a)b"}, {"guided_json": SCHEMA}, {"guided_json": False},
    {"guided_json": {"$ref": "#/nowhere"}}, {"guided_json": {"pattern": "[a", "type": "string"}},
    {"ebnf": "root ::= x"}, {"guided_grammar": "start: x"}, {"guided_grammar": 'start: "a" }'},
    {"guided_grammar": "start: <x>"}, {"guided_grammar": "start: a\na: a"}, {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"json": SCHEMA, "regex": "a"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
]  # fmt: skip
BODIES: list[tuple[str, Any]] = [
    (CHAT, b"{"), (CHAT, b"\xff"), (CHAT, b"[" * 100_000), (CHAT, {"messages": 5}),
    (CHAT, {"messages": [{"role": "x"}]}),
    (CHAT, {"messages": [USER], "temperature": "x"}), (CHAT, {"messages": [USER], "chat_template_kwargs": {"a b": 1}}),
    (CHAT, {"messages": [USER], "model": "../../x"}), (CHAT, {"messages": [{"role": "user", "content": "x" * 9999}]}),
    (TEXT, {"prompt": [2**80]}), (TEXT, {"prompt": "\ud800"}), (TEXT, {"prompt": {"a": [1]}}), ("/nowhere", {}),
    *((TEXT, {"prompt": "x", **grammar}) for grammar in GRAMMARS),
    *((CHAT, {"messages": [USER], **grammar}) for grammar in GRAMMARS),
    ("/generate", {"inputs": "x", "parameters": {"regular_constraint": "[a"}}),
    ("/generate", {"inputs": 5}), ("/get_score", {"chat": "x"}), ("/tokens", {"text": 5}),
]  # fmt: skip


@pytest.fixture
def served(folder: Path) -> Iterator[Runner]:
    runner = Runner(folder)
    yield runner
    runner.close()


def test_no_refusal_tells_of_the_inside(served: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answers() -> list[tuple[int, str]]:
        found = []
        for path, body in BODIES:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            async with served.stand.session.post(served.stand.url + path, data=data) as response:
                found.append((response.status, await response.text()))
        monkeypatch.setattr("aiollm.api.chat.output_limit", lambda *args: Path("/root/secret").read_text())
        async with served.stand.session.post(served.stand.url + CHAT, json={"messages": [USER]}) as response:
            found.append((response.status, await response.text()))
        return found

    *refused, (status, broken) = served.run(answers())
    for code, text in refused:
        told = json.loads(text)["error"]["message"]
        assert 400 <= code < 500 and not SECRETS.search(told), told
    assert status == 500 and not SECRETS.search(json.loads(broken)["error"]["message"]) and "secret" not in broken


def test_what_a_template_raises_does_not_show_the_server(tmp_path: Path) -> None:
    async def main() -> None:
        for number, source in enumerate(("{{ messages.x.y }}", "{{ [].pop() }}", "{{ cycler.__init__.__globals__ }}")):
            async with stand(write_byte_tokenizer(tmp_path / str(number), source)) as served:
                status, answer = await served.post(CHAT, {"messages": [USER]})
                assert status == 400 and not SECRETS.search(answer["error"]["message"])

    asyncio.run(main())


def test_no_address_in_a_message_is_opened(served: Runner) -> None:
    """A picture, or a link in a text: the server listens to whoever sends it, and goes nowhere itself."""
    with socket.create_server(("127.0.0.1", 0)) as bait:
        bait.setblocking(False)
        port = bait.getsockname()[1]
        urls = [
            f"http://127.0.0.1:{port}/x.png", f"http://[::1]:{port}/", f"http://0x7f000001:{port}/", "file:///etc/passwd",
            f"http://127.1:{port}/", "/proc/self/environ", "data:", "data:image/png;base64", f"gopher://127.0.0.1:{port}/",
            f"ftp://127.0.0.1:{port}/", "http://169.254.169.254/", "data:image/png;base64," + "A" * 1_000_000,
        ]  # fmt: skip

        async def main() -> None:
            for url in urls:
                part = {"type": "image_url", "image_url": {"url": url}}
                status, answer = await served.stand.post(CHAT, {"messages": [{"role": "user", "content": [part]}]})
                assert status == 400 and answer["error"]["param"] == "messages"
                assert "root:" not in answer["error"]["message"]
            link = {"role": "user", "content": f"![x](http://127.0.0.1:{port}/x.png)"}
            assert (await served.stand.post(CHAT, {"messages": [link], "max_tokens": 1}))[0] == 200

        served.run(main())
        with pytest.raises(BlockingIOError):
            bait.accept()


@pytest.mark.parametrize("path", [*ADMIN, *PATHS])
def test_nothing_for_operators_and_no_file_is_behind_the_public_port(served: Runner, path: str) -> None:
    async def main() -> None:
        for method in (b"GET", b"POST"):
            request = b"%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            answer = await served.stand.raw(request % (method, path.encode()))
            assert answer.split(b" ")[1] in (b"400", b"404", b"405"), answer
            assert b"root:" not in answer

    served.run(main())
