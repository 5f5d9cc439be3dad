// A conversation as the server keeps it: begins it, loads it page by page, and changes it.

import {ApiError, get, isSession, ofSession, patch, post, url} from './api.js';

// Messages that are loaded at first, and at once later.
const FIRST = 60, MORE = 500;
const RETRIES = 3, RETRY_MS = 1000;

export async function beginSession({title, model, settings, system}) {
  const session = await post('v1/sessions', {title, model, settings,
    ...(system ? {system} : {})});
  if (!isSession(session.id)) throw new ApiError(0, 'The server began no conversation.');
  const stored = system ? await get(url`v1/sessions/${session.id}/messages`) : {data: []};
  return {session, messages: stored.data};
}

// Its latest messages, newest first, back to the end of the branch that is shown; the `first` of
// all; `rest`, after which the earlier ones come; and the turns that run. Null once nobody
// `isWanting` it any more.
export async function loadSession(id, isWanting) {
  const [session, latest, {data: [first]}, running] = await Promise.all([
    get(url`v1/sessions/${id}`), pageOf(id, FIRST),
    get(url`v1/sessions/${id}/messages?limit=1`), get(url`v1/sessions/${id}/turns`)]);
  ofSession(id, session);
  const messages = [...latest.data];
  let page = latest;
  const isHead = each => each.id === session.head;
  while (page.has_more && session.head && !page.data.some(isHead)) {
    if (!isWanting()) return null;
    page = await pageOf(id, MORE, {after: page.last_id});
    messages.push(...page.data);
  }
  return {session, messages, first, running: running.data,
    rest: page.has_more ? page.last_id : null};
}

// A page of its messages, newest first.
async function pageOf(id, limit, more = {}) {
  const asked = new URLSearchParams({tree: 1, order: 'desc', render: 'html', limit, ...more});
  const page = await get(url`v1/sessions/${id}/messages` + '?' + asked);
  for (const message of page.data) ofSession(id, {id: message.session});
  return page;
}

// The page of messages before one; tries again while somebody `isWanting` it.
export async function pageBefore(id, after, isWanting) {
  for (let failures = 1;; failures++) {
    try { return await pageOf(id, MORE, {after}); } catch (error) {
      if (failures > RETRIES || !isWanting()) throw error;
    }
    await new Promise(resolve => setTimeout(resolve, failures * RETRY_MS));
  }
}

export async function changeSession(session, fields) {
  const changed = await patch(url`v1/sessions/${session.id}`, fields);
  Object.assign(session, ofSession(session.id, changed));
}

// Another system prompt begins a branch of its own.
export async function setSystem(id, text) {
  await post(url`v1/sessions/${id}/messages`, {
    message: {role: 'system', content: text}, parent: 'root', branch: true, reply: false});
}
