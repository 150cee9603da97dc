import asyncio
import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from stand import CONTEXT, Runner, stand

TEXT = "/v1/completions"
BODY: dict[str, Any] = {"prompt": "hi", "max_tokens": 2}
DATA = json.dumps(BODY).encode()
LIMIT = 16 * CONTEXT + 4 * 1024 * 1024


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", "application/problem+json", "text/plain",
             "application/x-www-form-urlencoded"],
)  # fmt: skip
def test_json_is_taken_under_any_name(served: Runner, kind: str) -> None:
    assert served.run(served.stand.post(TEXT, DATA, **{"Content-Type": kind}))[0] == 200


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x"])
def test_what_is_no_json_and_does_not_claim_to_be_is_415(served: Runner, kind: str) -> None:
    status, answer = served.run(served.stand.post(TEXT, b"prompt=hi", **{"Content-Type": kind}))
    assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")
    assert "Content-Type: application/json" in answer["error"]["message"]


@pytest.mark.parametrize(("encoding", "encode"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_bodies_are_inflated(served: Runner, encoding: str, encode: Any) -> None:
    status, answer = served.run(served.stand.post(TEXT, encode(DATA), **{"Content-Encoding": encoding}))
    assert status == 200 and answer["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, gzip", "x"])
def test_other_encodings_are_415(served: Runner, encoding: str) -> None:
    status, answer = served.run(served.stand.post(TEXT, DATA, **{"Content-Encoding": encoding}))
    assert (status, answer["error"]["code"]) == (415, "unsupported_encoding")


ZIPPED = gzip.compress(DATA, mtime=0)  # always the same: test names hold it


@pytest.mark.parametrize("data", [b"no gzip at all", ZIPPED[:-12], b"", ZIPPED[:5]])
def test_a_body_that_is_not_what_its_encoding_says_is_400(served: Runner, data: bytes) -> None:
    status, answer = served.run(served.stand.post(TEXT, data, **{"Content-Encoding": "gzip"}))
    assert (status, answer["error"]["code"]) == (400, "invalid_body")


def test_a_bomb_is_cut_at_the_limit(served: Runner) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    status, answer = served.run(served.stand.post(TEXT, bomb, **{"Content-Encoding": "gzip"}))
    assert (status, answer["error"]["code"]) == (413, "body_too_large")


def test_a_body_that_announces_too_much_is_refused_at_once(served: Runner) -> None:
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: "
    for length in (LIMIT + 1, 10 * 1024**3):
        answer = served.run(served.stand.refusal(f"{head}{length}\r\n\r\n".encode() + DATA))
        assert answer.startswith(b"HTTP/1.1 413 ") and b"Connection: close" in answer
        assert str(LIMIT).encode() in answer


def test_a_body_without_an_end_is_cut_at_the_limit(served: Runner) -> None:
    async def endless() -> Any:
        while True:
            yield b" " * 65536

    async def main() -> None:
        async with served.stand.session.post(served.stand.url + TEXT, data=endless()) as response:
            assert response.status == 413

    served.run(main())


def test_a_long_body_within_the_limit_is_taken(served: Runner) -> None:
    padding = " " * (LIMIT - len(DATA) - 100)
    kind = {"Content-Type": "application/json"}
    assert served.run(served.stand.post(TEXT, DATA + padding.encode(), **kind))[0] == 200
    status, answer = served.run(served.stand.post(TEXT, b"{" + DATA + padding.encode(), **kind))
    assert (status, answer["error"]["code"]) == (400, "invalid_json")


def test_a_body_that_does_not_arrive_is_408(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder, body_timeout=0.05) as served:
            head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode()
            answer = await served.refusal(head)
            assert answer.startswith(b"HTTP/1.1 408 ") and b'"code":"body_timeout"' in answer
            assert b"Connection: close" in answer

    asyncio.run(main())


def test_broken_chunks_are_refused(served: Runner) -> None:
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = served.run(served.stand.raw(head.encode() + b"zz\r\nhello\r\n"))
    assert b" 400 " in answer.split(b"\r\n")[0]


def test_a_connection_outlives_refusals(served: Runner) -> None:
    def sent(path: str, data: bytes, more: str = "") -> bytes:
        return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n{more}\r\n".encode() + data

    async def main() -> bytes:
        return await served.stand.raw(
            sent(TEXT, b'{"prompt":5}')
            + sent("/nothing", DATA)
            + sent("/v1/models", DATA)
            + sent(TEXT, b"prompt=hi", "Content-Type: application/x-www-form-urlencoded\r\n")
            + sent(TEXT, DATA, "Content-Encoding: gzip\r\n")
            + sent(TEXT, b'{"prompt":"x","model":"other"}')
            + sent(TEXT, DATA, "Connection: close\r\n")
        )

    answers = served.run(main()).split(b"HTTP/1.1 ")[1:]
    assert [int(answer[:3]) for answer in answers] == [400, 404, 405, 415, 400, 404, 200]
    assert all(answer.endswith(b"}}\n") for answer in answers[:-1]) and b'"text":"hi"' in answers[-1]
