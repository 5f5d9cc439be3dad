// The list of conversations: search, new, rename, export, delete.

import {get, ofSession, patch, remove, request, url} from './api.js';
import {$, ask, el, iconButton, note, save} from './dom.js';
import {openMenu} from './menu.js';

const LIMIT = 40, MOST = 1000;

export class Sidebar {
  // `open(id)` shows a conversation, `gone(id)` hears of one that was deleted.
  constructor(open, gone) {
    this.open = open;
    this.gone = gone;
    this.sessions = [];
    this.rows = new Map();  // by conversation, or by day
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
    // As many as are there: what was loaded by "more" stays.
    const limit = after ? LIMIT : Math.min(MOST, Math.max(LIMIT, this.sessions.length));
    const asked = new URLSearchParams({limit});
    if (this.query) asked.set('query', this.query);
    if (after) asked.set('after', after);
    let found;
    try { found = await get('v1/sessions?' + asked); } catch (error) {
      if (error.status !== 401 && round === this.round) this.say(error.message);
      return;
    }
    if (round !== this.round) return;
    const sessions = found.data || [];
    this.sessions = after ? [...this.sessions, ...sessions] : sessions;
    $('more').hidden = !(found.has_more ?? sessions.length === limit);
    this.show();
  }

  say(text) { $('sessions').replaceChildren(el('li', {class: 'hint'}, text)); }

  show() {
    if (!this.sessions.length) {
      this.say(this.query ? 'Nothing found.' : 'Conversations will be here.');
      return;
    }
    // Elements that stay are not touched: they may have the focus, a menu, or half a click.
    const rows = new Map();
    for (const session of this.sessions) {
      const when = day(session.updated_at), {id} = session;
      if (!rows.has(when)) rows.set(when, this.rows.get(when) || el('li', {class: 'day'}, when));
      rows.set(id, this.rows.get(id) || this.row(id));
      this.update(rows.get(id), session);
    }
    this.rows = rows;
    const shown = [...rows.values()], list = $('sessions'), focused = document.activeElement;
    if (shown.length !== list.children.length || shown.some((row, i) => row !== list.children[i])) {
      list.replaceChildren(...shown);
      if (list.contains(focused)) focused.focus();
    }
    this.choose(this.current);
  }

  row(id) {
    const menu = () => {
      const session = this.sessions.find(each => each.id === id);
      openMenu(more, [
        {label: 'Rename', action: () => this.rename(session)},
        {label: 'Export as Markdown', action: () => this.export(session, 'markdown')},
        {label: 'Export as JSON', action: () => this.export(session, 'json')},
        null,
        {label: 'Delete', isGrave: true, action: () => this.delete(session)},
      ], `Actions for ${session.title || 'Untitled'}`);
    };
    const more = iconButton('more', '', menu, {'aria-haspopup': 'menu', 'aria-expanded': 'false'});
    const row = el('li', {}, el('a', {href: '#' + encodeURIComponent(id),
      onclick: event => { event.preventDefault(); this.open(id); }}, el('span', {})),
    el('i', {class: 'dot loading', title: 'Answering'}), more);
    row.dataset.id = id;
    return row;
  }

  update(row, session) {
    const title = session.title || 'Untitled', [link, dot, more] = row.children;
    link.title = title;
    if (link.textContent !== title) link.firstChild.textContent = title;
    dot.hidden = !session.running?.length;
    more.title = `More for ${title}`;
    more.setAttribute('aria-label', more.title);
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
      const {id} = session;
      const changed = ofSession(id, await patch(url`v1/sessions/${id}`, {title}));
      // The list may have been loaded anew since, and one on its way has the old title.
      this.sessions = this.sessions.map(each => (each.id === id ? changed : each));
      this.show();
      this.load();
      if (session.id === this.current) document.title = `${title || 'Chat'} · llmkit`;
    } catch (error) { note(error.message, true); }
  }

  async delete(session) {
    const isSure = await ask({title: 'Delete this conversation?', isGrave: true, action: 'Delete',
      text: `“${session.title || 'Untitled'}” and all its branches will be gone.`});
    if (!isSure) return;
    try { await remove(url`v1/sessions/${session.id}`); } catch (error) {
      if (error.status !== 404) { note(error.message, true); return; }
    }
    this.sessions = this.sessions.filter(each => each.id !== session.id);
    this.show();
    this.load();
    this.gone(session.id);
    note('Deleted.');
  }

  async export(session, format) {
    try {
      const reply = await request('GET', url`v1/sessions/${session.id}/export?format=${format}`);
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
