"""What goes on here: a page for people at the mount's root, and the same as JSON. Tornado loop only."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import psutil

from llmkit.gateway.engines import EngineDirectory, Entry
from llmkit.gateway.exchange import Exchange
from llmkit.version import __version__

__all__ = ["StatusRoutes", "send_page"]

QUIET = ("/", "/status", "/health", "/docs", "/swagger-ui", "/openapi.json")
MAX_CALLERS, MAX_GONE = 200, 20
STYLE = """
:root { color-scheme: light dark; --ink: #1f1f1f; --soft: #5a5a5a; --line: #c9c9c9; --back: #fff; --box: #f5f5f5; --accent: #1565c0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --soft: #b5b5b5; --line: #4a4a4a; --back: #111; --box: #1c1c1c; --accent: #82b8ff; } }
body { font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink); background: var(--back);
  margin: 2em auto; max-width: 76em; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.1em; margin: 1.6em 0 .4em; }
a { color: var(--accent); } p, caption { color: var(--soft); } caption { text-align: left; padding-bottom: .3em; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35em .9em .35em 0; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; white-space: nowrap; }
th { font-weight: 600; } code { background: var(--box); padding: .1em .3em; border-radius: 3px; }
meter { width: 7em; vertical-align: middle; } label { color: var(--soft); }
"""
SCRIPT = """
const box = document.getElementById('live'), main = document.getElementById('state'), note = document.getElementById('note');
const lock = document.getElementById('lock'), field = document.getElementById('key');
const here = location.pathname.replace(/\\/?$/, '/') + 'status?part=1&no_track_activity=1';
const kept = value => {  // null forgets it; a browser that keeps nothing for pages asks each time
  try {
    if (value === null) sessionStorage.removeItem('llmkit-key');
    else if (value === undefined) return sessionStorage.getItem('llmkit-key');
    else sessionStorage.setItem('llmkit-key', value);
  } catch (error) {}
  return null;
};
let last = '', key = lock ? kept() : null;
async function load() {
  const mine = key;
  try {
    const reply = await fetch(here, {credentials: 'same-origin', headers: key ? {Authorization: 'Bearer ' + key} : {}});
    const text = reply.ok ? await reply.text() : '';
    if (mine !== key) return;
    note.textContent = reply.ok ? '' : reply.status === 401 && lock ? 'This is not the key.'
      : 'The server refuses to say more (' + reply.status + '); these numbers are old.';
    if (lock) {
      lock.hidden = reply.ok;
      if (reply.ok && key) kept(key); else if (reply.status === 401) { key = null; kept(null); }
    }
    if (text && text !== last && !main.contains(document.activeElement)) { main.innerHTML = text; last = text; }
  } catch (error) { note.textContent = 'The server does not answer; these numbers are old.'; }
}
if (lock) lock.addEventListener('submit', event => {
  event.preventDefault();
  key = /^[\x20-\x7e]+$/.test(field.value) ? field.value : '?';
  field.value = '';
  load();
});
if (key) load();
setInterval(() => { if (box.checked && !document.hidden && (!lock || key)) load(); }, 2000);
"""
LOCK = """<form id="lock"><p>This gateway has a key, which stays in this tab. <label for="key">Key</label>
<input id="key" type="password" autocomplete="current-password" required> <button>Show</button></p></form>
<noscript><p>This needs JavaScript; or ask <code>status</code> with the key in the header <code>Authorization</code>.</p></noscript>"""


@dataclass(slots=True)
class Running:
    """A request that is being answered."""

    caller: str
    route: str
    began: float


class StatusRoutes:
    """Models, memory and requests of a gateway. ``places`` gives the notebook of a kernel, by kernel id."""

    def __init__(self, directory: EngineDirectory, places: Callable[[], Awaitable[dict[str, str]]] | None = None) -> None:
        self._directory, self._places = directory, places
        self._running: dict[int, Running] = {}
        self._callers: Counter[str] = Counter()
        self._began = time.time()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @contextlib.contextmanager
    def watching(self, exchange: Exchange) -> Iterator[None]:
        """Counts a request while it runs."""
        if exchange.path in QUIET:
            yield
            return
        if exchange.caller in self._callers or len(self._callers) < MAX_CALLERS:
            self._callers[exchange.caller] += 1
        self._running[id(exchange)] = Running(exchange.caller, f"{exchange.method} {exchange.path:.100}", time.monotonic())
        try:
            yield
        finally:
            del self._running[id(exchange)]

    async def _state(self) -> dict[str, Any]:
        places = await self._places() if self._places is not None else {}
        now = time.monotonic()
        return {
            "version": __version__,
            "up_s": round(time.time() - self._began, 1),
            "models": [self._model(entry, places) for entry in self._directory.entries()],
            "gone": [{"id": name, "reason": reason} for name, reason in self._directory.gone.items() if "@" not in name][-MAX_GONE:],
            "requests": [{"caller": r.caller, "route": r.route, "seconds": round(now - r.began, 1)} for r in self._running.values()],
            "callers": [{"caller": caller, "requests": count} for caller, count in self._callers.most_common(50)],
        }

    @staticmethod
    def _model(entry: Entry, places: dict[str, str]) -> dict[str, Any]:
        d, stats, connection = entry.client.description, entry.client.stats(), entry.client.connection
        try:
            rss = int(psutil.Process(connection.pid).memory_info().rss)
        except psutil.Error:
            rss = 0
        return {
            "id": entry.model_id,
            "quantization": d.quantization,
            "device": d.device,
            "n_ctx": d.n_ctx,
            "kernel": connection.kernel_id,
            "place": places.get(connection.kernel_id or "", ""),
            "pid": connection.pid,
            "weights_bytes": d.weights_bytes,
            "kv_bytes": d.kv_bytes,
            "rss_bytes": rss,
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "num_slots": stats.num_slots,
            "kv_usage": round(stats.kv_usage, 4),
            "requests_total": stats.requests_total,
            "prompt_tokens_total": stats.prompt_tokens_total,
            "cached_tokens_total": stats.cached_tokens_total,
            "generation_tokens_total": stats.generation_tokens_total,
        }

    async def status(self, exchange: Exchange) -> None:
        state = await self._state()
        if exchange.query("part"):
            exchange.send_page(fragment(state))
        else:
            exchange.send_json(state)

    async def page(self, exchange: Exchange) -> None:
        send_page(exchange, fragment(await self._state()))


def send_page(exchange: Exchange, state: str | None) -> None:
    """The page with its changing part; without it, one that asks for the key and fetches it then."""
    nonce = secrets.token_urlsafe(16)
    base = "" if exchange.path_ends_with_slash else "llmkit/"
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>llmkit: models and requests</title><style>{STYLE}</style></head><body><h1>llmkit</h1>"
        "<p>The models of your notebooks, for other programs: the address is this one with <code>v1</code> at the end. "
        f'<a href="{base}docs">Its routes</a></p>{LOCK if state is None else ""}'
        f'<p><label><input type="checkbox" id="live" checked> update every two seconds</label> <span id="note" role="status"></span></p>'
        f'<main id="state">{state or ""}</main><script nonce="{nonce}">{SCRIPT}</script></body></html>'
    )
    exchange.send_page(text, nonce, 401 if state is None else 200, {"WWW-Authenticate": "Bearer"} if state is None else None)


def fragment(state: dict[str, Any]) -> str:
    """The changing part of the page; everything from outside is escaped."""
    models = [
        (
            f"<code>{escape(m['id'])}</code>",
            escape(f"{m['quantization']}, {m['device']}"),
            escape(m["place"] or (f"kernel {m['kernel'][:8]}" if m["kernel"] else f"process {m['pid']}")),
            f"{_size(m['rss_bytes'])} <small>({_size(m['weights_bytes'])} weights, {_size(m['kv_bytes'])} KV)</small>",
            f"{m['num_running']} of {m['num_slots']}, {m['num_waiting']} waiting",
            f'<meter min="0" max="1" value="{m["kv_usage"]}" aria-label="KV in use"></meter> {m["kv_usage"]:.0%}',
            f"{m['requests_total']:,}",
            f"{m['prompt_tokens_total']:,} ({_share(m['cached_tokens_total'], m['prompt_tokens_total'])} cached), {m['generation_tokens_total']:,}",
        )
        for m in state["models"]
    ]
    heads = ("model", "kind", "where", "memory", "running", "KV in use", "requests", "tokens in, out")
    empty = "No model is loaded. In a notebook: <code>import llmkit; llm = llmkit.load()</code>"
    requests = [(escape(r["caller"]), f"<code>{escape(r['route'])}</code>", f"{r['seconds']:.1f} s") for r in state["requests"]]
    gone = [(f"<code>{escape(g['id'])}</code>", escape(g["reason"])) for g in state["gone"]]
    callers = [(escape(c["caller"]), f"{c['requests']:,}") for c in state["callers"]]
    return (
        _table("Models", heads, models, empty)
        + (_table("Not here any more", ("model", "why"), gone, "") if gone else "")
        + _table("Requests now", ("from", "route", "since"), requests, "None at the moment.")
        + _table("Recent callers", ("from", "requests"), callers, "Nobody yet.")
        + f"<p>llmkit {escape(state['version'])}, up for {state['up_s'] / 60:.0f} min</p>"
    )


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> str:
    if not rows:
        return f"<h2>{title}</h2><p>{empty}</p>"
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>{title}</h2><div class="wide" tabindex="0" role="region" aria-label="{title}">{table}</div>'


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "0%"
