"""HTTPS: a real server with a certificate, and what is said of files that are none."""

import asyncio
import signal
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
import trustme
from serving import Server
from tiny_model import write_tiny_model
from tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer

from aiollm import doctor, tls
from aiollm.config import Config

FLAGS = ("--data_type", "fp32", "--threads", "1", "--max_total_token_num", "20000", "--running_max_req_size", "16")
ASKED = {"prompt": "hi", "max_tokens": 40, "ignore_eos": True, "stream": True}
TALK = {"type": "chat", "id": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


class Files:
    """An authority, and what it has signed, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA()
        self.folder = folder
        self.authority = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(str(self.authority))

    def issue(self, name: str) -> tuple[Path, Path]:
        """Certificate and key, in the place of those that had the name before."""
        made = self.ca.issue_cert("127.0.0.1")
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        made.cert_chain_pems[0].write_to_path(str(certificate))
        made.private_key_pem.write_to_path(str(key))
        return certificate, key

    def client(self, *certificate: Path) -> ssl.SSLContext:
        """What a client knows who trusts the authority, and shows a certificate and key."""
        context = ssl.create_default_context(cafile=str(self.authority))
        if certificate:
            context.load_cert_chain(*certificate)
        return context


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    write_tiny_model(made, vocab_size=VOCAB_SIZE, max_position_embeddings=2048)
    return write_byte_tokenizer(made)


def serial(server: Server, client: ssl.SSLContext) -> str:
    """Of the certificate that a new connection is shown."""
    host, port = server.url.removeprefix("https://").split(":")
    with (
        socket.create_connection((host, int(port)), 30) as plain,
        client.wrap_socket(plain, server_hostname=host) as to,
    ):
        found = to.getpeercert()
        assert found is not None
        return str(found["serialNumber"])


def hang_up(server: Server, says: str) -> None:
    """SIGHUP, and wait until the log says it once more."""
    before, deadline = server.log().count(says), time.monotonic() + 30
    server.process.send_signal(signal.SIGHUP)
    while server.log().count(says) == before:
        assert time.monotonic() < deadline, server.log()
        time.sleep(0.01)


def plainly(server: Server) -> bytes:
    """What is answered to HTTP without TLS."""
    host, port = server.url.removeprefix("https://").split(":")
    with socket.create_connection((host, int(port)), 30) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
        try:
            return plain.recv(1 << 16)
        except ConnectionResetError:
            return b""


async def talk(server: Server, client: ssl.SSLContext) -> None:
    """A stream, a WebSocket, and a stream that is left in its midst."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=client)) as session:
        async with session.post(server.url + "/v1/completions", json=ASKED) as answer:
            assert answer.status == 200
            assert (await answer.text()).endswith("data: [DONE]\n\n")
        async with session.ws_connect(server.url + "/v1/chat/ws", origin=server.url) as chat:
            await chat.send_json(TALK)
            seen = [""]
            while seen[-1] != "done" and "error" not in seen:
                seen.append((await chat.receive_json(timeout=60))["type"])
            assert seen[-1] == "done"
        async with session.post(server.url + "/v1/completions", json=ASKED | {"max_tokens": 1900}) as answer:
            await answer.content.readline()
        async with asyncio.timeout(60):
            while True:  # until its slots are free
                async with session.get(server.url + "/metrics") as answer:
                    if "\naiollm_num_requests_running 0" in await answer.text():
                        break


def test_a_server_with_a_certificate_speaks_https_and_takes_a_new_one_at_a_hangup(
    model: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(files.authority))  # whom urllib trusts
    certificate, key = files.issue("server")
    flags = ("--ssl_certfile", str(certificate), "--ssl_keyfile", str(key))
    with Server("--model_dir", str(model), *flags, *FLAGS) as server:
        assert server.url.startswith("https://127.0.0.1:")
        client = files.client()
        asyncio.run(talk(server, client))
        assert plainly(server) == b""
        first = serial(server, client)
        files.issue("server")
        key.write_text("no key")
        hang_up(server, f"SIGHUP changes nothing: --ssl_certfile {certificate}, --ssl_keyfile {key}: there is no")
        assert serial(server, client) == first
        files.issue("server")
        hang_up(server, "SIGHUP: 0 API keys, certificate, log level info")
        assert serial(server, client) != first
        assert server.get("/health")[0] == 200
        assert "Traceback" not in server.log()


def test_clients_show_a_certificate_where_issuers_are_named(
    model: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = files.issue("server")
    flags = ("--ssl_certfile", str(certificate), "--ssl_keyfile", str(key), "--ssl_ca_certs", str(files.authority))
    with Server("--model_dir", str(model), *flags, *FLAGS, ready=False) as server:
        serial(server, files.client(*files.issue("client")))

        async def health(client: ssl.SSLContext) -> int:
            async with (
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=client)) as session,
                session.get(server.url + "/health") as answer,
            ):
                return answer.status

        assert asyncio.run(health(files.client(*files.issue("client")))) == 200
        with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
            asyncio.run(health(files.client()))
        assert "Traceback" not in server.log()


CASES: dict[str, tuple[Callable[[Files, Path, Path], tuple[str, str, str]], str]] = {
    "a key alone": (lambda f, c, k: ("", str(k), ""), "--ssl_keyfile .*server.key needs --ssl_certfile"),
    "issuers alone": (lambda f, c, k: ("", "", str(c)), "--ssl_ca_certs .*server.pem needs --ssl_certfile"),
    "no such certificate": (lambda f, c, k: (f"{c}.not", str(k), ""), "--ssl_certfile .*pem.not: No such file"),
    "no such key": (lambda f, c, k: (str(c), f"{k}.not", ""), "--ssl_keyfile .*key.not: No such file"),
    "no such issuers": (lambda f, c, k: (str(c), str(k), f"{c}.not"), "--ssl_ca_certs .*pem.not: No such file"),
    "a certificate without its key": (lambda f, c, k: (str(c), "", ""), "there is no certificate and its key in PEM"),
    "the key of another one": (lambda f, c, k: (str(c), str(f.issue("other")[1]), ""), "another certificate's"),
    "issuers that are none": (lambda f, c, k: (str(c), str(k), str(k)), "--ssl_ca_certs .*: there is no certificate"),
    "a key with a password": (lambda f, c, k: (str(c), str(locked(k)), ""), "locked.key: the key has a password"),
}


def locked(key: Path) -> Path:
    """The key behind a password."""
    from cryptography.hazmat.primitives import serialization as form

    plain = form.load_pem_private_key(key.read_bytes(), None)
    way = form.BestAvailableEncryption(b"secret")
    made = plain.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, way)
    (key.parent / "locked.key").write_bytes(made)
    return key.parent / "locked.key"


@pytest.mark.parametrize("case", CASES)
def test_files_that_cannot_be_used_are_named_with_their_flag(files: Files, case: str) -> None:
    given, message = CASES[case]
    certfile, keyfile, ca_certs = given(files, *files.issue("server"))
    with pytest.raises(ValueError, match=message) as refused:
        tls.made(certfile, keyfile, ca_certs)
    (finding,) = doctor.certificate(Config(ssl_certfile=certfile, ssl_keyfile=keyfile, ssl_ca_certs=ca_certs))
    assert finding == ("fail", f"certificate: {refused.value}")


def test_one_file_may_hold_certificate_and_key(files: Files) -> None:
    certificate, key = files.issue("server")
    certificate.write_bytes(certificate.read_bytes() + key.read_bytes())
    assert tls.made(str(certificate), "", "") is not None
    assert tls.made("", "", "") is None
    assert next(doctor.certificate(Config(ssl_certfile=str(certificate)))).level == "ok"
