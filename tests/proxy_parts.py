"""nginx, Caddy and HAProxy, started with the files of `deploy/proxy`."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from deploy_tools import DEPLOY, run, tool

HOST = "llm.example.org"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def changed(name: str, *changes: tuple[str, str]) -> str:
    """A file of `deploy/proxy` with these changes, each of which must find its place."""
    text = (DEPLOY / "proxy" / name).read_text()
    for old, new in changes:
        assert old in text, f"{name} has no {old!r}"
        text = text.replace(old, new)
    return text


def nginx(folder: Path, port: int, target: str) -> list[str]:
    program = tool("nginx", "nginx-light")
    site = changed(
        "nginx.conf",
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("127.0.0.1:3000", target),
        ("/etc/nginx/tls", str(folder / "tls")),
    )
    (folder / "site.conf").write_text(site)
    places = " ".join(
        f"{name}_temp_path {folder}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; worker_processes 1; user root;\n"
        f"events {{}}\nhttp {{ access_log off; {places}\ninclude {folder}/site.conf;\n}}\n"
    )
    common = ["-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    run(program, "-t", *common)
    return [program, *common]


def caddy(folder: Path, port: int, target: str) -> list[str]:
    program = tool("caddy")
    run(program, "validate", "--adapter", "caddyfile", "--config", DEPLOY / "proxy" / "Caddyfile")
    site = changed(
        "Caddyfile",
        (
            f"{HOST} {{",
            f"https://{HOST}:{port} {{\n\tbind 127.0.0.1\n\ttls {folder}/tls.crt {folder}/tls.key",
        ),
        ("127.0.0.1:3000", target),
    )
    (folder / "Caddyfile").write_text(
        f"{{\n\tadmin off\n\tauto_https off\n\tdefault_sni {HOST}\n}}\n" + site
    )
    return [program, "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


def haproxy(folder: Path, port: int, target: str) -> list[str]:
    program = tool("haproxy", "haproxy")
    text = changed(
        "haproxy.cfg",
        # An account and a folder that the test may lack, and root may not give up everywhere.
        ("    user haproxy\n    group haproxy\n    chroot /var/lib/haproxy\n", ""),
        ("bind :443", f"bind 127.0.0.1:{port}"),
        ("/etc/haproxy/llm.pem", str(folder / "both.pem")),
        ("127.0.0.1:3000", target),
    )
    (folder / "haproxy.cfg").write_text(text)
    (folder / "both.pem").write_bytes(
        (folder / "tls.crt").read_bytes() + (folder / "tls.key").read_bytes()
    )
    run(program, "-c", "-f", folder / "haproxy.cfg")
    return [program, "-db", "-f", str(folder / "haproxy.cfg")]


@contextlib.contextmanager
def running(command: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("w+b") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(30)


def make_certificate(folder: Path) -> None:
    run(
        tool("openssl", "openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt",
        "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={HOST}", "-addext",
        f"subjectAltName=DNS:{HOST}", "-keyout", folder / "tls.key", "-out", folder / "tls.crt",
    )  # fmt: skip


Proxy = Callable[[Path, int, str], list[str]]
PROXIES = [pytest.param(make, id=make.__name__) for make in (nginx, caddy, haproxy)]
