// The list of conversations: search, new, rename, export, delete.

import {get, patch, remove, request} from './api.js';
import {$, ask, el, iconButton, note, save} from './dom.js';
import {openMenu} from './menu.js';

const LIMIT = 40;

export class Sidebar {
  // `open(id)` shows a conversation, `gone(id)` hears of one that was deleted.
  constructor(open, gone) {
    this.open = open;
    this.gone = gone;
    this.sessions = [];
    this.current = null;
    this.query = '';
    this.round = 0;
    let typing = 0;
    $('search').addEventListener('input', () => {
      clearTimeout(typing);
      typing = setTimeout(() => { this.query = $('search').value.trim(); this.load(); }, 200);
    });
    $('more').addEventListener('click', () => this.load(this.sessions.at(-1)?.id));
  }

  async load(after = null) {
    const round = ++this.round;
    const asked = new URLSearchParams({limit: LIMIT});
    if (this.query) asked.set('query', this.query);
    if (after) asked.set('after', after);
    let found;
    try { found = await get(`v1/sessions?${asked}`); } catch (error) {
      if (error.status !== 401) this.say(error.message);
      return;
    }
    if (round !== this.round) return;
    const sessions = found.data || [];
    this.sessions = after ? [...this.sessions, ...sessions] : sessions;
    $('more').hidden = !(found.has_more ?? sessions.length === LIMIT);
    this.show();
  }

  say(text) { $('sessions').replaceChildren(el('li', {class: 'hint'}, text)); }

  show() {
    if (!this.sessions.length) {
      this.say(this.query ? 'Nothing found.' : 'Conversations will be here.');
      return;
    }
    const focused = document.activeElement?.closest('#sessions li')?.dataset.id;
    let group = '';
    const rows = [];
    for (const session of this.sessions) {
      const when = day(session.updated_at);
      if (when !== group) rows.push(el('li', {class: 'day'}, when));
      group = when;
      rows.push(this.row(session));
    }
    $('sessions').replaceChildren(...rows);
    if (focused) $('sessions').querySelector(`[data-id="${focused}"] a`)?.focus();
  }

  row(session) {
    const title = session.title || 'Untitled';
    const more = iconButton('more', `More for ${title}`, () => openMenu(more, [
      {label: 'Rename', action: () => this.rename(session)},
      {label: 'Export as Markdown', action: () => this.export(session, 'markdown')},
      {label: 'Export as JSON', action: () => this.export(session, 'json')},
      null,
      {label: 'Delete', isGrave: true, action: () => this.delete(session)},
    ], `Actions for ${title}`), {'aria-haspopup': 'menu', 'aria-expanded': 'false'});
    const isCurrent = session.id === this.current;
    const isRunning = session.running?.length > 0;
    const row = el('li', {class: isCurrent ? 'current' : ''},
      el('a', {href: `#${session.id}`, title, 'aria-current': isCurrent ? 'page' : null,
        onclick: event => { event.preventDefault(); this.open(session.id); }},
      el('span', {}, title)),
      isRunning ? el('i', {class: 'dot loading', title: 'Answering'}) : null, more);
    row.dataset.id = session.id;
    return row;
  }

  choose(id) {
    this.current = id;
    for (const row of $('sessions').children) {
      const isCurrent = row.dataset.id === id && id !== null;
      row.classList.toggle('current', isCurrent);
      const link = row.querySelector('a');
      if (isCurrent) link.setAttribute('aria-current', 'page');
      else link?.removeAttribute('aria-current');
    }
  }

  async rename(session) {
    const title = await ask({title: 'Rename the conversation', value: session.title,
      action: 'Rename'});
    if (title === null || title === session.title) return;
    try {
      const changed = await patch(`v1/sessions/${session.id}`, {title});
      // The list may have been loaded anew since.
      this.sessions = this.sessions.map(each => (each.id === changed.id ? changed : each));
      this.show();
      if (session.id === this.current) document.title = `${title || 'Chat'} · llmkit`;
    } catch (error) { note(error.message, true); }
  }

  async delete(session) {
    const isSure = await ask({title: 'Delete this conversation?', isGrave: true, action: 'Delete',
      text: `“${session.title || 'Untitled'}” and all its branches will be gone.`});
    if (!isSure) return;
    try { await remove(`v1/sessions/${session.id}`); } catch (error) {
      if (error.status !== 404) { note(error.message, true); return; }
    }
    this.sessions = this.sessions.filter(each => each.id !== session.id);
    this.show();
    this.gone(session.id);
    note('Deleted.');
  }

  async export(session, format) {
    try {
      const reply = await request('GET', `v1/sessions/${session.id}/export?format=${format}`);
      const name = session.title.replace(/[^\p{L}\p{N} _-]+/gu, '').trim().slice(0, 60);
      save(`${name || session.id}.${format === 'json' ? 'json' : 'md'}`, await reply.blob());
    } catch (error) { note(error.message, true); }
  }
}

function day(seconds) {
  const then = new Date(seconds * 1000), now = new Date();
  const days = Math.round((now.setHours(0, 0, 0, 0) - new Date(then).setHours(0, 0, 0, 0)) / 864e5);
  if (days <= 0) return 'Today';
  if (days === 1) return 'Yesterday';
  if (days < 7) return 'This week';
  return then.toLocaleDateString('en', {month: 'long', year: 'numeric'});
}
