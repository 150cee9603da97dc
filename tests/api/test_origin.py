import pytest

from aiollm.api.errors import ApiError
from aiollm.api.origin import check_origin

LOOPBACK, OUTSIDE = "127.0.0.1", "192.0.2.7"


@pytest.mark.parametrize(
    ("origin", "host", "address"),
    [
        (None, "127.0.0.1:8000", LOOPBACK),
        (None, "localhost", LOOPBACK),
        (None, "[::1]:8000", "::1"),
        (None, None, OUTSIDE),
        (None, "gpu.example:8000", OUTSIDE),
        ("http://localhost:8000", "localhost:8000", LOOPBACK),
        ("http://LOCALHOST:8000", "localhost:8000", LOOPBACK),
        ("http://localhost", "localhost:80", LOOPBACK),
        ("https://gpu.example", "gpu.example", OUTSIDE),
        ("https://gpu.example", "gpu.example:443", OUTSIDE),
        ("http://localhost:9000", "localhost:9000", LOOPBACK),  # a forwarded port
    ],
)
def test_pages_of_this_server_and_programs_pass(origin: str | None, host: str | None, address: str) -> None:
    check_origin(origin, host, address)


ALLOWED = ("https://chat.example", "http://10.0.0.1:8080")


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://chat.example", "127.0.0.1:8000"),  # a proxy that does not pass Host on
        ("https://chat.example", "chat.example"),  # and one that does
        ("https://CHAT.example:443", "chat.example:443"),
        ("http://10.0.0.1:8080", "10.0.0.1:8080"),
        ("http://10.0.0.1:8080", "localhost"),
        (None, "chat.example"),
        ("http://localhost:8000", "localhost:8000"),
    ],
)
def test_pages_of_allowed_origins_pass_a_proxy_on_this_machine(origin: str | None, host: str) -> None:
    check_origin(origin, host, LOOPBACK, ALLOWED)
    check_origin(origin, host, OUTSIDE, ALLOWED)


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://chat.example", "127.0.0.1:8000"),  # not https
        ("https://chat.example:8443", "127.0.0.1:8000"),
        ("https://evil.chat.example", "127.0.0.1:8000"),
        ("https://chat.example.evil.example", "chat.example"),
        ("http://evil.example", "evil.example"),
        ("https://evil.example", "chat.example"),
        ("null", "chat.example"),
    ],
)
def test_an_allowed_origin_lets_no_other_in(origin: str, host: str) -> None:
    with pytest.raises(ApiError) as refused:
        check_origin(origin, host, LOOPBACK, ALLOWED)
    assert refused.value.status == 403 and "--allowed_origins" in refused.value.message


@pytest.mark.parametrize(
    ("origin", "host", "address", "code"),
    [
        ("http://evil.example", "localhost:8000", LOOPBACK, "origin_not_allowed"),
        ("http://localhost:3000", "localhost:8000", LOOPBACK, "origin_not_allowed"),
        ("null", "localhost:8000", LOOPBACK, "origin_not_allowed"),
        ("", "localhost:8000", LOOPBACK, "origin_not_allowed"),
        ("http://", "", OUTSIDE, "origin_not_allowed"),
        ("file://", "gpu.example", OUTSIDE, "origin_not_allowed"),
        ("http://user@gpu.example", "gpu.example", OUTSIDE, "origin_not_allowed"),
        ("http://gpu.example:99999", "gpu.example:99999", OUTSIDE, "origin_not_allowed"),
        ("http://evil.example:8000", "evil.example:8000", LOOPBACK, "host_not_allowed"),
        (None, "evil.example", "::1", "host_not_allowed"),
        (None, "127.0.0.1.evil.example", LOOPBACK, "host_not_allowed"),
        (None, "localhost@evil.example", LOOPBACK, "host_not_allowed"),
        (None, None, LOOPBACK, "host_not_allowed"),
    ],
)
def test_other_pages_and_names_are_refused(origin: str | None, host: str | None, address: str, code: str) -> None:
    with pytest.raises(ApiError) as refused:
        check_origin(origin, host, address)
    assert (refused.value.status, refused.value.code) == (403, code)
