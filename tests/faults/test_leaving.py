"""Clients that have left before anybody looked at what they sent."""

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from stand import Runner

TEXT = "/v1/completions"


@pytest.fixture
def served(folder: Path) -> Iterator[Runner]:
    runner = Runner(folder)
    yield runner
    runner.close()


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_has_left_already_leaves_no_traceback(
    served: Runner, streams: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The loop finds the request and the end of the connection in one turn, as a busy one does."""
    body = json.dumps({"prompt": [72, 105], "max_tokens": 400, "stream": streams}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"

    async def main() -> None:
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", served.stand.port)) as client:
                client.sendall(head.encode() + body)
        figure = served.stand.parts.metrics.registry.get_sample_value
        name = "aiollm_http_responses_total"
        await served.stand.until(lambda: sum(figure(name, {"status": status}) or 0 for status in ("200", "499")) >= 20)

    with caplog.at_level(logging.ERROR):
        served.run(main())
    assert caplog.text == ""
