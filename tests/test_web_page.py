"""The page and its files: what may run in it, how long they are kept, and who gets them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway_client import Api, is_error, serve

from llmkit.gateway import web
from llmkit.gateway.web import page
from llmkit.gateway.web.assets import MODULES, STYLES, folder

HERE = Path(web.__file__).parent
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'self'"
)


@pytest.fixture
async def locked() -> AsyncIterator[Api]:
    async for api in serve("sesame"):
        yield api


@pytest.mark.parametrize("path", ["/", "/chat"])
async def test_the_page_runs_only_this_servers_files(api: Api, path: str) -> None:
    reply = await api.fetch("GET", path)
    text = reply.body.decode()
    assert reply.code == 200 and reply.headers["Content-Security-Policy"] == POLICY
    assert reply.headers["Cache-Control"] == "no-cache"
    assert reply.headers["X-DNS-Prefetch-Control"] == "off"
    assert re.findall(r"<script[^>]*>([^<]+)", text) == []
    assert not re.search(r"<style|\sstyle=|\son\w+=|https?://", text)
    for address in re.findall(r'(?:src|href)="(assets/[^"]+)"', text):
        assert (await api.fetch("GET", f"/{address}")).code == 200, address


async def test_files_are_kept_for_good(api: Api) -> None:
    reply = await api.fetch("GET", f"/{folder()}/main.js")
    etag = reply.headers["ETag"]
    assert reply.headers["Cache-Control"] == "private, max-age=31536000, immutable"
    assert reply.headers["Content-Type"] == "text/javascript; charset=utf-8"
    again = await api.fetch("GET", f"/{folder()}/main.js", headers={"If-None-Match": etag})
    assert again.code == 304 and again.body == b"" and again.headers["ETag"] == etag
    # After an update, a page that is open still finds what is here, but keeps it for this once.
    old = await api.fetch("GET", "/assets/0123456789ab/main.js")
    assert old.body == reply.body and old.headers["Cache-Control"] == "private, no-cache"
    for name in ("main.py", "../__init__.py", "page.html", "%2e%2e/page.html"):
        is_error(await api.fetch("GET", f"/{folder()}/{name}"), 404)


async def test_with_a_key_the_page_is_a_lock(locked: Api) -> None:
    stranger = Api(locked.url)
    for path in ("/", "/chat"):
        reply = await stranger.fetch("GET", path, headers={"Accept": "text/html"})
        assert reply.code == 401 and b"data-locked" in reply.body
        assert reply.headers["WWW-Authenticate"] == "Bearer"
        is_error(await stranger.fetch("GET", path), 401)
        assert b"data-locked" not in (await locked.fetch("GET", path)).body
    assert (await stranger.fetch("GET", f"/{folder()}/main.js")).code == 200
    is_error(await stranger.fetch("GET", "/status"), 401)


@pytest.mark.parametrize(
    ("view", "home", "base", "chat", "status"),
    [
        ("chat", "chat", "", "./", "./#status"),
        ("chat", "chat", "../", "../", "../#status"),
        ("status", "status", "", "chat", "./"),
        ("chat", "status", "", "chat", "./"),
        ("status", "status", "llmkit/", "llmkit/chat", "llmkit/"),
    ],
)
def test_addresses_of_the_tabs(
    view: web.View, home: web.View, base: str, chat: str, status: str
) -> None:
    text = page(view, home, base=base)
    assert f'id="tab-chat" href="{chat}"' in text and f'id="tab-status" href="{status}"' in text


def test_every_file_is_in_the_page_and_every_import_is_there() -> None:
    files = {path.name for path in (HERE / "assets").iterdir()}
    assert files == {*MODULES, *STYLES, "theme.js", "icon.svg"}
    for name in MODULES:
        text = (HERE / "assets" / name).read_text()
        for wanted, source in re.findall(r"import \{([^}]+)\} from '\./([^']+)'", text):
            exported = (HERE / "assets" / source).read_text()
            for each in (w.strip() for w in wanted.split(",") if w.strip()):
                form = rf"^export (async )?(function\*? |const |class ){re.escape(each)}\b"
                assert re.search(form.replace(r"\$\b", r"\$"), exported, re.MULTILINE), each
        # Markup comes from the server, rendered, and nowhere else.
        uses = re.findall(r"(\S+)\.(?:innerHTML|outerHTML|insertAdjacentHTML) = ", text)
        assert uses == {"message.js": ["box"], "status.js": ["$('state')"]}.get(name, []), name
        assert not re.search(r"\beval\b|new Function|document\.write|setAttribute\('on", text)


def test_scripts_name_only_what_the_page_has() -> None:
    text = page("chat", "chat", base="")
    ids = set(re.findall(r'\bid="([\w-]+)"', text))
    for name in MODULES:
        source = (HERE / "assets" / name).read_text()
        ids |= set(re.findall(r"\bid: '([\w-]+)'", source))
        for wanted in re.findall(r"\$\('([\w-]+)'\)", source):
            assert wanted in ids, (name, wanted)


def test_files_are_short() -> None:
    for path in [*(HERE / "assets").iterdir(), *HERE.glob("*.html")]:
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, path.name
        if path.suffix in (".js", ".css", ".html"):
            assert all(len(line) <= 100 for line in lines), path.name
