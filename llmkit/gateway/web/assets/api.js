// Requests to the gateway: its address, the key of this tab, and errors as people read them.

const root = document.documentElement;
export const base = new URL(root.dataset.base || './', location.href);
export const address = path => new URL(path, base);

// The key lives in this tab only. Where the browser stores nothing, it is asked for each time.
let key = null;
try { key = sessionStorage.getItem('llmkit-key'); } catch (error) { /* stores nothing */ }
let asking = () => {};

export const currentKey = () => key;

export function setKey(value) {
  key = value;
  try {
    if (value === null) sessionStorage.removeItem('llmkit-key');
    else sessionStorage.setItem('llmkit-key', value);
  } catch (error) { /* stores nothing */ }
}

// What happens when the server wants a key, or another one.
export function onLocked(action) { asking = action; }
export const askForKey = () => asking(key !== null);

export class ApiError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

// A path with ids in it, which lead nowhere else whatever they are: url`v1/sessions/${id}`.
export function url(parts, ...ids) {
  return parts.reduce((made, part, i) => {
    const id = String(ids[i - 1]);
    if (/^\.*$/.test(id)) throw new ApiError(0, 'The server names something in a strange way.');
    return made + encodeURIComponent(id) + part;
  });
}

export const isSession = id => typeof id === 'string' && /^sess_[0-9a-f]{24}$/.test(id);

// What was said of a conversation, if it is the one that was asked for.
export function ofSession(id, session) {
  if (session?.id !== id || !isSession(id)) {
    throw new ApiError(0, 'The server answers with another conversation.', 'other_session');
  }
  return session;
}

// Jupyter wants the value of its cookie with whatever changes something, a hub's service what it
// has put into the page with everything.
export function xsrf() {
  if (root.dataset.proof) return root.dataset.proof;
  const found = document.cookie.match(/(?:^|; )_xsrf=([^;]*)/);
  return found ? decodeURIComponent(found[1]) : null;
}

function headers(method, body) {
  const sent = {};
  if (key) sent.Authorization = 'Bearer ' + key;
  if (body !== undefined) sent['Content-Type'] = 'application/json';
  const token = xsrf();
  if (token) sent['X-XSRFToken'] = token;
  return sent;
}

export async function request(method, path, body, options = {}) {
  const sent = key;
  let reply;
  try {
    reply = await fetch(address(path), {
      method, credentials: 'same-origin', headers: headers(method, body), ...options,
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ApiError(0, 'The server does not answer.', 'offline');
  }
  if (reply.ok) return reply;
  if (reply.status === 401 && sent === key) askForKey();
  let message = `The server answers ${reply.status}.`, code = null;
  try {
    const {error} = await reply.json();
    message = error.message || error || message;
    code = error.code;
  } catch (error) { /* not ours, say a proxy's */ }
  throw new ApiError(reply.status, message, code);
}

export const get = async path => (await request('GET', path)).json();
export const getText = async path => (await request('GET', path)).text();
export const post = async (path, body) => (await request('POST', path, body)).json();
export const patch = async (path, body) => (await request('PATCH', path, body)).json();
export const remove = path => request('DELETE', path);

// The events of a request, one after the other.
export async function* events(method, path, body) {
  const reply = await request(method, path, body);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split('\n\n');
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split('\n').filter(line => line.startsWith('data: '))
        .map(line => line.slice(6)).join('\n');
      if (data && data !== '[DONE]') yield JSON.parse(data);
    }
  }
}
