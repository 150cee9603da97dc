import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chrome import PATIENCE, Browser, Page, browser, executable
from stand import Stand, stand
from tiny_tokenizer import write_byte_tokenizer

RICH = """# Title
Text with **bold**, *slanted*, `code` and [a link](https://a.example/x_(y)).

1. one
   - inner
2. two

| a | b |
|---|--:|
| x | 1 |

```python
def f(): return "<b>"
```
> quoted
"""

Scenario = Callable[[Page, Stand], Awaitable[None]]
Chatting = Callable[..., None]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[asyncio.Runner, Browser]]:
    """One browser, and the loop on which everything runs. Where CI=true a missing Chromium is a failure."""
    if executable() is None:
        reason = "Chromium is not installed (Debian: apt-get install chromium)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        found = runner.run(stack.enter_async_context(browser(tmp_path_factory.mktemp("profile"))))
        yield runner, found
        runner.run(stack.aclose())


@pytest.fixture
def chatting(chromium: tuple[asyncio.Runner, Browser], folder: Path) -> Chatting:
    """`chatting(scenario)` runs it on a fresh tab, whose page is connected to a stand of its own."""
    runner, found = chromium

    def run(scenario: Scenario, **options: Any) -> None:
        async def main() -> None:
            async with asyncio.timeout(2 * PATIENCE), stand(folder, **options) as served, found.page() as page:
                await page.open(served.url + "/")
                if not options.get("loading"):
                    await page.until("document.querySelector('#status').dataset.state === 'ready'")
                await scenario(page, served)
                assert page.errors == [] and page.dialogs == []
                assert all(url.split("://")[1].startswith(f"127.0.0.1:{served.port}/") for url in page.requests)

        runner.run(main())

    return run


@pytest.fixture
def rich() -> str:
    """An answer with everything in it."""
    return RICH
