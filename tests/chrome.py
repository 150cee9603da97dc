"""Headless Chromium, driven through its DevTools protocol: keys, clicks and questions as a user's hand and eye."""

import asyncio
import base64
import contextlib
import itertools
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--remote-debugging-port=0", "--host-resolver-rules=MAP chat.test 127.0.0.1",
)  # fmt: skip
PATIENCE = 30  # seconds for the browser to start, and for anything awaited on a page
KEYS = {
    "Enter": ("Enter", 13, "\r"),
    "Escape": ("Escape", 27, ""),
    "Tab": ("Tab", 9, ""),
    "Space": (" ", 32, " "),
}
SHIFT = 8


def executable() -> str | None:
    """Chromium's path, if it is installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """One tab with a storage of its own. `requests` are the URLs that it asked for, `dialogs` what it popped up."""

    def __init__(self, browser: "Browser", session: str) -> None:
        self._browser = browser
        self._session = session
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        self.errors: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        return await self._browser.call(method, params, self._session)

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def value(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression, awaited."""
        answer = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def text(self, selector: str) -> str:
        """What is to be read in the elements of a selector."""
        found: str = await self.value(
            f"[...document.querySelectorAll({selector!r})].map(element => element.innerText).join('\\n')"
        )
        return found

    async def until(self, expression: str) -> None:
        """Wait until an expression holds."""
        try:
            async with asyncio.timeout(PATIENCE):
                while not await self.value(f"Boolean({expression})"):
                    await asyncio.sleep(0.02)
        except TimeoutError:
            seen = await self.value("document.body.innerText")
            raise AssertionError(f"{expression} never held; the page says:\n{seen}\n{self.errors}") from None

    async def click(self, selector: str) -> None:
        await self.until(f"document.querySelector({selector!r})")
        await self.value(f"document.querySelector({selector!r}).click()")

    async def type(self, text: str) -> None:
        """Into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def press(self, name: str, shift: bool = False) -> None:
        key, code, text = KEYS[name]
        event = {"key": key, "code": name, "windowsVirtualKeyCode": code, "modifiers": SHIFT if shift else 0}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    async def size(self, width: int, height: int, mobile: bool = False, scale: float = 1) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )

    async def prefer(self, scheme: str) -> None:
        """`light` or `dark`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def picture(self, path: Path) -> None:
        """Save what is to be seen as PNG."""
        answer = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))


class Browser:
    """The protocol's connection: answers by number, events to their page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}

    async def call(self, method: str, params: dict[str, Any], session: str = "") -> dict[str, Any]:
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        frame = {"id": number, "method": method, "params": params}
        await self._socket.send_json(frame | ({"sessionId": session} if session else {}))
        async with asyncio.timeout(PATIENCE):
            return await answer

    async def listen(self) -> None:
        async for message in self._socket:
            frame = message.json()
            if "id" in frame:
                answer = self._waiting.pop(frame["id"])
                if answer.done():
                    continue  # nobody waits any more
                if "error" in frame:
                    answer.set_exception(RuntimeError(str(frame["error"])))
                else:
                    answer.set_result(frame["result"])
            elif frame.get("sessionId") in self._pages:
                await self._event(self._pages[frame["sessionId"]], frame["method"], frame["params"])

    async def _event(self, page: Page, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            page.requests.append(params["request"]["url"])
        elif method == "Network.webSocketCreated":
            page.requests.append(params["url"])
        elif method == "Runtime.exceptionThrown":
            page.errors.append(str(params["exceptionDetails"]))
        elif method == "Page.javascriptDialogOpening":
            page.dialogs.append(params["message"])
            number = next(self._numbers)
            self._waiting[number] = asyncio.get_running_loop().create_future()
            frame = {"id": number, "method": "Page.handleJavaScriptDialog", "params": {"accept": False}}
            await self._socket.send_json(frame | {"sessionId": page._session})

    @contextlib.asynccontextmanager
    async def page(self) -> AsyncIterator[Page]:
        """A fresh tab, as in a browser that was never used."""
        context = (await self.call("Target.createBrowserContext", {}))["browserContextId"]
        target = await self.call("Target.createTarget", {"url": "about:blank", "browserContextId": context})
        attach = {"targetId": target["targetId"], "flatten": True}
        page = Page(self, (await self.call("Target.attachToTarget", attach))["sessionId"])
        self._pages[page._session] = page
        for domain in ("Page", "Runtime", "Network"):
            await page.call(f"{domain}.enable")
        try:
            yield page
        finally:
            await self.call("Target.disposeBrowserContext", {"browserContextId": context})


@contextlib.asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Browser]:
    """Start Chromium with an empty profile in `folder`."""
    path = executable()
    assert path is not None
    port = folder / "DevToolsActivePort"
    process = await asyncio.create_subprocess_exec(
        path, *FLAGS, f"--user-data-dir={folder}", "about:blank",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL, env=os.environ | {"HOME": str(folder)},
    )  # fmt: skip
    try:
        async with asyncio.timeout(PATIENCE):
            while not port.exists() or port.read_text().count("\n") < 1:
                assert process.returncode is None, "Chromium ended at once"
                await asyncio.sleep(0.02)
        number, path = port.read_text().split()
        url = f"ws://127.0.0.1:{number}{path}"
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
            found = Browser(socket)
            listening = asyncio.create_task(found.listen())
            yield found
            listening.cancel()
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
