"""A chat in the terminal with a server that runs: `aiollm chat`. Plain text, so that it works in a pipe too.

Each line is a message. Ctrl-C stops an answer, which stays in the conversation as far as it came.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import aiohttp

COMMANDS = """\
/new            begin a new conversation
/system TEXT    begin a new one under this system prompt; without TEXT under none
/quit           leave, as Ctrl-D does"""

# Name -> placeholder of the value, and what it says.
OPTIONS = {
    "url": ("URL", "address of the server (http://127.0.0.1:8000)"),
    "model": ("NAME", "one of the names under which the server has its model"),
    "system": ("TEXT", "system prompt"),
    "temperature": ("NUMBER", "0 takes the likeliest token, higher is more random; without it the model's default"),
    "max_tokens": ("TOKENS", "length of an answer at most; without it all that fits"),
    "api_key": ("KEY", "sent to servers that ask for one (AIOLLM_API_KEY in the environment)"),
}
URL = "http://127.0.0.1:8000"
LOADING_SECONDS = 0.5  # between two looks at a server that loads
# What would control the terminal; a model may be talked into saying it.
CONTROL = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


class ChatError(Exception):
    """The server cannot be reached, or refuses; the message is for the user."""


class Chat:
    """One conversation: `messages` in OpenAI's form. Output goes to stdout, everything else to stderr."""

    def __init__(self, url: str, key: str, fields: Mapping[str, Any], system: str) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._fields = fields
        self.messages: list[dict[str, str]] = []
        self.begin(system)

    def begin(self, system: str | None = None) -> None:
        """Forget what was said; a system prompt stays until there is another."""
        if system is not None:
            self._opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._opening)

    async def ready(self) -> None:
        """Wait until the server has loaded its model."""
        said = ""
        async with self._session() as session:
            while True:
                try:
                    async with session.get(f"{self._url}/ready") as response:
                        if response.status in (200, 404):  # 404: not ours, but it may speak the same interface
                            return
                        state = await response.json()
                except (aiohttp.ClientError, ValueError) as error:
                    raise ChatError(f"no server answers at {self._url} ({error}); `aiollm serve` starts one") from error
                if state.get("status") != "loading":
                    raise ChatError(f"the server is {state.get('status')}: {state.get('error')}")
                if state.get("phase") != said:
                    said = state.get("phase")
                    print(f"the server is loading: {said}", file=sys.stderr)
                await asyncio.sleep(LOADING_SECONDS)

    async def answer(self, pieces: list[str]) -> None:
        """Print the answer to the conversation as it comes; `pieces` holds what came. Raises ChatError."""
        body = {**self._fields, "messages": self.messages, "stream": True}
        thinking = False
        try:
            async with (
                self._session() as session,
                session.post(f"{self._url}/v1/chat/completions", json=body) as response,
            ):
                if response.status != 200:
                    raise ChatError(_reason(await response.text(), response.status))
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        event = json.loads(line[6:])
                        text, thought = _text(event), _text(event, "reasoning")
                        if thought or (thinking and text):  # to stderr, so that a pipe has the answer alone
                            print(thought.translate(CONTROL) or "\n\n", end="", file=sys.stderr, flush=True)
                        thinking = bool(thought) or (thinking and not text)
                        pieces.append(text)
                        print(text.translate(CONTROL), end="", flush=True)
        except aiohttp.ClientError as error:
            raise ChatError(f"the connection broke: {error}") from error

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(headers=self._headers, timeout=aiohttp.ClientTimeout(total=None, sock_connect=10))


def main(argv: Sequence[str]) -> int:
    """The exit status is 1 where a message of a pipe got no answer."""
    options = _parse(argv)
    fields: dict[str, Any] = {name: options[name] for name in ("model", "temperature", "max_tokens") if name in options}
    key = options.get("api_key", os.environ.get("AIOLLM_API_KEY", "").partition(",")[0])
    chat = Chat(options.get("url", URL), key, fields, options.get("system", ""))
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    try:
        asyncio.run(chat.ready())
        if terminal:
            import readline  # noqa: F401  from now on input() edits and remembers lines

            print(f"{COMMANDS}\n", file=sys.stderr)
        return converse(chat, lines(terminal), terminal)
    except ChatError as error:
        print(f"aiollm: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
        return 1
    except KeyboardInterrupt:
        return 130


def lines(terminal: bool) -> Iterator[str]:
    """What is typed or piped in. On a terminal Ctrl-C drops the line."""
    while True:
        try:
            yield input("> " if terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\n/quit or Ctrl-D leaves", file=sys.stderr)


def converse(chat: Chat, said: Iterator[str], terminal: bool) -> int:
    """Answer every line. A terminal goes on after an error, a pipe ends with it."""
    for line in said:
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            break
        if command in ("/new", "/system"):
            chat.begin(rest.strip() if command == "/system" else None)
        elif command.startswith("/"):
            print(f"{command} is none of these:\n{COMMANDS}", file=sys.stderr)
        elif command and not _turn(chat, line, terminal):
            return 1
    return 0


def _turn(chat: Chat, line: str, terminal: bool) -> bool:
    """Say a line and print the answer; False where a pipe should end."""
    chat.messages.append({"role": "user", "content": line})
    pieces: list[str] = []
    try:
        asyncio.run(chat.answer(pieces))
    except KeyboardInterrupt:
        print("\n[stopped]", file=sys.stderr)
    except ChatError as error:
        if not terminal:
            raise
        print(f"aiollm: {error}", file=sys.stderr)
    text = "".join(pieces)
    if text:
        chat.messages.append({"role": "assistant", "content": text})
    else:
        chat.messages.pop()  # it was not answered: say it again
    print(flush=True)
    return True


def _text(event: dict[str, Any], field: str = "content") -> str:
    """The text of one event under `field`. Raises ChatError for one that tells of an error."""
    if "error" in event:
        raise ChatError(str(event["error"].get("message")))
    return "".join(choice["delta"].get(field) or "" for choice in event.get("choices", ()))


def _reason(body: str, status: int) -> str:
    """What a refusal says."""
    try:
        message = str(json.loads(body)["error"]["message"])
        return f"{message}; --api_key and AIOLLM_API_KEY say which" if status == 401 else message
    except (ValueError, KeyError, TypeError):
        return f"the server answered with status {status}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"aiollm chat: {message}\n`aiollm chat --help` lists the flags\n")


def _parse(argv: Sequence[str]) -> dict[str, Any]:
    parser = _Parser(
        prog="aiollm chat",
        description="Talk to a running server. Each line is a message; Ctrl-C stops an answer.",
        epilog="In the chat: " + "; ".join(" ".join(line.split()) for line in COMMANDS.splitlines()),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    types = {"NUMBER": float, "TOKENS": int}
    for name, (unit, text) in OPTIONS.items():
        spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        parser.add_argument(*spellings, metavar=unit, help=text, type=types.get(unit, str))
    return vars(parser.parse_args(argv))
