// The socket of all turns: connects when needed, comes back after a loss, and resumes its turns.

import {address, askForKey, currentKey, xsrf} from './api.js';

const FIRST_DELAY_MS = 300, MOST_DELAY_MS = 8000, PING_MS = 25000;
const UNWANTED = 1008;  // how the server closes the socket of whom it does not know, or no longer

export class ChatSocket {
  // `onEvent` hears every event of a turn; `onState` whether there is a connection.
  constructor(onEvent, onState = () => {}) {
    this.onEvent = onEvent;
    this.onState = onState;
    this.turns = new Map();  // turn → the number of its last event
    this.waiting = new Map();  // ref → what to do with the answer
    this.resuming = new Map();  // turn → the ref of the request to go on with it
    this.queue = [];
    this.numRefs = 0;
    this.delay = FIRST_DELAY_MS;
    this.socket = null;
    document.addEventListener('visibilitychange', () => {
      if (!document.hidden && this.turns.size) this.connect();
    });
    window.addEventListener('online', () => this.connect());
    setInterval(() => this.isOpen && this.put({type: 'ping'}), PING_MS);
  }

  get isOpen() { return this.socket !== null && this.socket.readyState === WebSocket.OPEN; }

  connect() {
    if (this.socket !== null && this.socket.readyState <= WebSocket.OPEN) return;
    clearTimeout(this.timer);
    const url = address('v1/chat/ws');
    url.protocol = url.protocol.replace('http', 'ws');
    if (xsrf()) url.searchParams.set('_xsrf', xsrf());  // a socket has no headers
    const socket = this.socket = new WebSocket(url);
    socket.onopen = () => this.opened();
    socket.onmessage = message => this.heard(JSON.parse(message.data));
    socket.onclose = event => this.closed(socket, event);
  }

  opened() {
    this.fault = null;
    if (currentKey()) this.put({type: 'auth', key: currentKey()});
    for (const turn of this.turns.keys()) this.resume(turn);
    for (const frame of this.queue.splice(0)) this.put(frame);
    this.onState(true);
  }

  closed(socket, {code}) {
    if (socket !== this.socket) return;
    this.socket = null;
    this.resuming.clear();
    if (code === UNWANTED) { this.refused(); return; }
    for (const [ref, {frame, reject}] of [...this.waiting]) {
      if (this.queue.includes(frame)) continue;  // it was never sent
      this.waiting.delete(ref);
      reject(Object.assign(new Error('The connection was lost.'), {isLost: true}));
    }
    if (!this.turns.size && !this.queue.length) return;
    this.onState(false);
    this.timer = setTimeout(() => this.connect(), this.delay * (0.7 + 0.6 * Math.random()));
    this.delay = Math.min(MOST_DELAY_MS, this.delay * 2);
  }

  // To connect again would not help: nothing is followed any more, nor waits to be sent.
  refused() {
    const {queue, fault} = this;
    const waiting = [...this.waiting.values()], turns = [...this.turns.keys()];
    this.queue = [];
    this.waiting.clear();
    this.turns.clear();
    if (fault?.type === 'authentication_error') askForKey();
    for (const {frame, reject} of waiting) {
      const error = new Error(fault?.message || 'The connection was refused.');
      reject(Object.assign(error, {isLost: !queue.includes(frame)}));  // sent: it may have begun
    }
    for (const turn of turns) this.onEvent({type: 'lost', turn});
  }

  put(frame) {
    if (this.isOpen) this.socket.send(JSON.stringify(frame));
    else { this.queue.push(frame); this.connect(); }
  }

  // Begin a turn; gives its `turn` event. Rejects with what the server says against it.
  begin(frame) {
    const ref = `r${++this.numRefs}`;
    frame = {...frame, ref, render: true};
    return new Promise((resolve, reject) => {
      this.waiting.set(ref, {frame, resolve, reject});
      this.put(frame);
    });
  }

  // Follow a turn that runs already, from its beginning; also one that is followed already.
  follow(turn) {
    this.turns.set(turn, 0);
    if (this.isOpen) this.resume(turn);
    else this.connect();
  }

  // Go on with a turn after the last event that was heard.
  resume(turn) {
    const ref = `r${++this.numRefs}`;
    this.resuming.set(turn, ref);
    this.put({type: 'resume', turn, after: this.turns.get(turn), ref, render: true});
  }

  // Give up what waits for a connection: it was never sent.
  withdraw() {
    for (const [ref, {frame, reject}] of [...this.waiting]) {
      if (!this.queue.includes(frame)) continue;
      this.queue = this.queue.filter(each => each !== frame);
      this.waiting.delete(ref);
      reject(new Error('It was not sent.'));
    }
  }

  cancel(turn) { this.put({type: 'cancel', turn}); }

  heard(event) {
    const {type, turn, ref} = event;
    if (type === 'hello') this.delay = FIRST_DELAY_MS;  // it knows who this is
    if (type === 'error' && !turn && !ref) this.fault = event.error;
    if (type === 'turn' && ref && this.waiting.has(ref)) {
      this.turns.set(turn, this.turns.get(turn) || 0);
      this.waiting.get(ref).resolve(event);
      this.waiting.delete(ref);
    } else if (type === 'error' && ref && this.waiting.has(ref)) {
      const error = new Error(event.error.message);
      error.code = event.error.code;
      this.waiting.get(ref).reject(error);
      this.waiting.delete(ref);
      return;
    }
    for (const [resumed, own] of this.resuming) {
      if (own !== ref) continue;
      this.resuming.delete(resumed);
      if (type !== 'error') continue;
      this.turns.delete(resumed);  // over for too long, or the server began anew
      this.onEvent({type: 'lost', turn: resumed});
      return;
    }
    if (!turn || this.resuming.has(turn)) return;  // from before it was asked for again
    if (event.seq !== undefined && type !== 'html' && this.turns.has(turn)) {
      if (event.seq <= this.turns.get(turn)) return;  // heard before the connection was lost
      this.turns.set(turn, event.seq);
    }
    if (type === 'end' || type === 'error') this.turns.delete(turn);
    this.onEvent(event);
  }
}
