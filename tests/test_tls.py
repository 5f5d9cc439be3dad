"""TLS from files: what is refused at the start, and certificates that change while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import socket
import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from access_client import exchange_raw, served
from fakes import FakeClient, wait_for
from gateway_client import CHAT

from llmkit.errors import InvalidRequestError
from llmkit.gateway.certificates import read_validity
from llmkit.gateway.tls import Certificates
from llmkit.settings.gateway import GatewayOptions

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
OTHERS = pytest.mark.skipif(os.name != "posix", reason="files have no modes")


def openssl(command: str) -> None:
    subprocess.run(["openssl", *command.split()], check=True, capture_output=True)


def make_pair(folder: Path, name: str) -> tuple[str, str]:
    """A self-signed certificate and its key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    openssl(
        f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} -days 30 "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}"
    )
    key.chmod(0o600)
    return str(cert), str(key)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("tls")
    return {name: make_pair(folder, name) for name in ("one", "two")}


def trusting(cert: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=cert)


def subject_of(port: int) -> str:
    """The name in the certificate that a new connection gets."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", port), 30) as plain,
        context.wrap_socket(plain) as tls,
    ):
        der = tls.getpeercert(binary_form=True)
    assert der is not None
    return "one" if b"one" in der else "two"


GET = b"GET /health HTTP/1.1\r\nHost: llm.example.org\r\nConnection: close\r\n\r\n"


async def test_answers_come_by_https(model: FakeClient, pairs: dict[str, tuple[str, str]]) -> None:
    cert, key = pairs["one"]
    async with served(tls_cert=cert, tls_key=key, port=443) as api:
        assert api.url.startswith("https://")
        answer = await exchange_raw(api.port, GET, tls=trusting(cert))
        head = answer.partition(b"\r\n\r\n")[0].lower()
        assert b"strict-transport-security: max-age=31536000" in head
        local = GET.replace(b"llm.example.org", b"localhost")
        answer = await exchange_raw(api.port, local, tls=trusting(cert))
        assert b"strict-transport-security" not in answer.lower(), "it would break other ports"
        with pytest.raises(ssl.SSLCertVerificationError):
            await exchange_raw(api.port, GET, tls=ssl.create_default_context())
        assert api.access.tls is not None
        assert api.access.tls.minimum_version == ssl.TLSVersion.TLSv1_2
        with contextlib.suppress(ConnectionResetError):
            assert await exchange_raw(api.port, GET) == b"", "plain HTTP gets nothing"
    async with served(tls_cert=cert, tls_key=key, port=8443) as api:
        answer = await exchange_raw(api.port, GET, tls=trusting(cert))
        assert b"strict-transport-security" not in answer.lower(), "nor other ports of a host"


async def test_a_handshake_that_never_ends_is_let_go(
    pairs: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmkit.gateway.server.HEADER_S", 0.5)
    cert, key = pairs["one"]
    async with served(tls_cert=cert, tls_key=key) as api:
        readers = [(await asyncio.open_connection("127.0.0.1", api.port)) for _ in range(20)]
        async with asyncio.timeout(30):
            assert await asyncio.gather(*(reader.read() for reader, _ in readers)) == [b""] * 20
        for _, writer in readers:
            writer.close()
        monkeypatch.undo()
        assert await asyncio.to_thread(subject_of, api.port) == "one"


async def test_new_files_are_used_for_new_connections(
    model: FakeClient,
    tmp_path: Path,
    pairs: dict[str, tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("llmkit.gateway.access.opening.CERTIFICATES_S", 0.05)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def install(name: str, *, only_cert: bool = False) -> None:
        shutil.copyfile(pairs[name][0], cert)
        if not only_cert:
            shutil.copyfile(pairs[name][1], key)
            key.chmod(0o600)

    install("one")
    async with served(tls_cert=str(cert), tls_key=str(key)) as api:

        async def becomes(name: str) -> bool:
            for _ in range(600):
                if await asyncio.to_thread(subject_of, api.port) == name:
                    return True
                await asyncio.sleep(0.05)
            return False

        assert await becomes("one")
        context = trusting(pairs["one"][0])
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port, ssl=context)
        install("two")
        assert await becomes("two")
        writer.write(GET)  # the connection that was open goes on
        assert (await reader.readline()).startswith(b"HTTP/1.1 ")
        writer.close()
        caplog.clear()  # the new certificate may have been seen before its key
        with caplog.at_level(logging.ERROR, "llmkit.gateway"):
            install("one", only_cert=True)
            await asyncio.to_thread(
                wait_for, lambda: "the old certificate stays in use" in caplog.text
            )
        assert "was not made for the key" in caplog.text
        assert caplog.text.count("stays in use") == 1, "said once, not at each look"
        assert await asyncio.to_thread(subject_of, api.port) == "two"
        cert.unlink()
        await asyncio.sleep(0.3)
        assert await asyncio.to_thread(subject_of, api.port) == "two"
        install("one")
        assert await becomes("one")
        key.chmod(0o644)
        for part, file in zip(pairs["two"], (cert, key), strict=True):
            shutil.copyfile(part, file)
        told = f"run `chmod 600 {key}` first"
        await asyncio.to_thread(wait_for, lambda: told in caplog.text)
        key.chmod(0o600)
        assert await becomes("two"), "what the log said is enough"


async def test_settings_may_name_other_files(pairs: dict[str, tuple[str, str]]) -> None:
    first, second = (dict(zip(("tls_cert", "tls_key"), pairs[n], strict=True)) for n in pairs)
    async with served(**first) as api:
        watch = asyncio.ensure_future(api.access.keep_certificates(api.server))
        api.access.apply(GatewayOptions(**second), ())
        with pytest.raises(InvalidRequestError, match="on or off"):
            api.access.apply(GatewayOptions(), ())
        with pytest.raises(InvalidRequestError, match="cannot be read"):
            api.access.apply(GatewayOptions(tls_cert="/nothing", tls_key=second["tls_key"]), ())
        for _ in range(300):
            if await asyncio.to_thread(subject_of, api.port) == "two":
                break
            await asyncio.sleep(0.1)
        else:
            pytest.fail("the other certificate was not taken")
        watch.cancel()


def test_a_certificate_of_another_key_is_an_error(pairs: dict[str, tuple[str, str]]) -> None:
    with pytest.raises(InvalidRequestError, match="was not made for the key"):
        Certificates(pairs["one"][0], pairs["two"][1])


@OTHERS
@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o777])
def test_a_key_that_others_may_read_is_refused(
    pairs: dict[str, tuple[str, str]], tmp_path: Path, mode: int
) -> None:
    key = tmp_path / "open.key"
    shutil.copyfile(pairs["one"][1], key)
    key.chmod(mode)
    with pytest.raises(InvalidRequestError, match=f"chmod 600 {key}"):
        Certificates(pairs["one"][0], key)
    key.chmod(0o640)
    Certificates(pairs["one"][0], key)  # a group of certificate readers is usual


def test_bad_files_are_named(pairs: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    cert, key = pairs["one"]
    locked = tmp_path / "locked.key"
    openssl(f"pkey -in {key} -aes256 -passout pass:x -out {locked}")
    text, empty, pipe = tmp_path / "text", tmp_path / "empty", tmp_path / "pipe"
    text.write_text("-----BEGIN CERTIFICATE-----\nbm90aGluZw==\n-----END CERTIFICATE-----\n")
    empty.touch()
    os.mkfifo(pipe)
    for path in (text, empty, locked):
        path.chmod(0o600)
    for pair, words in (
        (("/nothing", key), "cannot be read: No such file"),
        ((cert, str(tmp_path)), "cannot be read"),
        ((str(pipe), key), "not a regular file"),
        ((key, key), "holds no certificate"),
        ((cert, cert), "everyone|holds no private key"),
        ((str(empty), key), "holds no certificate"),
        ((str(text), key), "cannot be used"),
        ((cert, str(locked)), "is encrypted"),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            Certificates(*pair)


def test_certificates_that_are_not_valid_now_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = datetime.now(UTC)

    def made(name: str, since: timedelta, until: timedelta) -> str:
        caplog.clear()
        dates = [(now + each).strftime("%Y%m%d%H%M%SZ") for each in (since, until)]
        key = tmp_path / f"{name}.key"
        openssl(f"genpkey -algorithm ed25519 -out {key}")
        key.chmod(0o600)
        cert = _signed(tmp_path, name, key, *dates)
        with caplog.at_level(logging.WARNING, "llmkit.gateway"):
            Certificates(cert, key)
        validity = read_validity(cert.read_bytes())
        assert [validity.since, validity.until] == [
            datetime.strptime(d, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC) for d in dates
        ]
        return caplog.text

    day = timedelta(days=1)
    assert "has expired" in made("past", -2 * day, -day)
    assert "only valid from" in made("future", day, 2 * day)
    assert "expires in 2 days" in made("soon", -day, 3 * day)
    assert made("good", -day, 90 * day) == ""
    assert made("far", -day, timedelta(days=365 * 60)) == "", "after 2049 dates are longer"


def _signed(folder: Path, name: str, key: Path, since: str, until: str) -> Path:
    """A certificate with these dates, which only `openssl ca` lets one choose."""
    request, cert, config = folder / f"{name}.csr", folder / f"{name}.pem", folder / "ca.conf"
    (folder / "index").write_text("")
    config.write_text(
        "[ca]\ndefault_ca=c\n[c]\npolicy=p\ndefault_md=sha256\nrand_serial=yes\n"
        f"database={folder}/index\nnew_certs_dir={folder}\n[p]\ncommonName=supplied\n"
    )
    openssl(f"req -new -key {key} -subj /CN={name} -out {request}")
    openssl(
        f"ca -batch -selfsign -config {config} -keyfile {key} -in {request} -out {cert} -notext "
        f"-startdate {since} -enddate {until}"
    )
    return cert


async def test_chat_over_tls(model: FakeClient, pairs: dict[str, tuple[str, str]]) -> None:
    cert, key = pairs["one"]
    body = json.dumps({**CHAT, "stream": True}).encode()
    async with served(tls_cert=cert, tls_key=key) as api:
        request = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        answer = await exchange_raw(api.port, request, tls=trusting(cert))
        assert answer.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in answer


def test_a_certificate_that_ends_soon_is_told_of_once_a_day(
    pairs: dict[str, tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    start = datetime.now(UTC)
    certificates = Certificates(*pairs["one"])  # for 30 days

    def said(days: float) -> list[str]:
        caplog.clear()
        assert not certificates.refresh(start + timedelta(days=days))
        return [record.getMessage() for record in caplog.records]

    with caplog.at_level(logging.WARNING, "llmkit.gateway"):
        assert said(10) == [] == said(22)
        (soon,) = said(24.5)
        assert "expires in 5 days" in soon
        assert said(24.6) == [] == said(25.4)
        assert "expires in 4 days" in said(25.6)[0]
        assert "has expired" in said(31)[0] and said(31.5) == []
