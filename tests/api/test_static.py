import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from stand import Runner, stand

from aiollm.api.static import POLICY, page_routes

FOLDER = Path(__file__).resolve().parents[2] / "aiollm/api/page"
FILES = sorted(path.name for path in FOLDER.iterdir())


def get(served: Runner, path: str, **headers: str) -> tuple[int, Any, bytes]:
    async def run() -> tuple[int, Any, bytes]:
        async with served.stand.session.get(served.stand.url + path, headers=headers) as answer:
            return answer.status, answer.headers, await answer.read()

    return served.run(run())


def test_every_file_of_the_page_is_served_and_nothing_else() -> None:
    expected = {"/" if name == "index.html" else f"/static/{name}" for name in FILES}
    assert page_routes().keys() == expected


@pytest.mark.parametrize("name", FILES)
def test_files_come_whole_under_a_policy_that_lets_nothing_else_in(served: Runner, name: str) -> None:
    status, headers, body = get(served, "/" if name == "index.html" else f"/static/{name}")
    assert (status, body) == (200, (FOLDER / name).read_bytes())
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert headers["Content-Type"] == f"{kinds[name.rpartition('.')[2]]}; charset=utf-8"
    assert headers["Content-Security-Policy"] == POLICY
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_the_policy_starts_from_nothing() -> None:
    assert POLICY.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    assert "unsafe" not in POLICY and "*" not in POLICY
    for directive in ("base-uri", "form-action", "frame-ancestors"):
        assert f"{directive} 'none'" in POLICY


def test_what_a_browser_has_is_not_sent_again(served: Runner) -> None:
    _, headers, _ = get(served, "/")
    assert headers["Cache-Control"] == "no-cache"
    status, again, body = get(served, "/", **{"If-None-Match": f'"other", {headers["ETag"]}'})
    assert (status, body, again["ETag"]) == (304, b"", headers["ETag"])
    assert get(served, "/", **{"If-None-Match": '"other"'})[0] == 200


@pytest.mark.parametrize(
    "path", ["/static/", "/static/index.html", "/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py"]
)
def test_no_path_reaches_another_file(served: Runner, path: str) -> None:
    async def run() -> bytes:
        return await served.stand.refusal(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

    assert b"HTTP/1.1 404 " in served.run(run())


def test_the_page_is_there_while_the_model_loads(folder: Path) -> None:
    async def main() -> int:
        async with stand(folder, loading=True) as served, served.session.get(served.url + "/") as answer:
            return answer.status

    assert asyncio.run(main()) == 200


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith((".js", ".html"))])
def test_text_is_never_parsed_as_markup_or_code(name: str) -> None:
    source = (FOLDER / name).read_text(encoding="utf-8")
    traps = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|setHTML|srcdoc|"
        r"\beval\b|\bnew Function\b|\bimport\(|setAttribute\(.on|javascript:|\sstyle=|\son\w+="
    )
    assert re.findall(traps, source) == []


@pytest.mark.parametrize("name", FILES)
def test_nothing_comes_from_outside(name: str) -> None:
    source = (FOLDER / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert re.findall(r"(?:https?:)?//\w+\.\w+|@import|\burl\(", source) == []
