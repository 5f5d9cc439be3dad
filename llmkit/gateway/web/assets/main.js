// The page: puts its parts together, knows the address, the theme, the tabs and the keys.

import {address, currentKey, get, isSession, onLocked, setKey} from './api.js';
import {Composer} from './composer.js';
import {Conversation} from './conversation.js';
import {$, icon, note} from './dom.js';
import {Models} from './models.js';
import {Settings} from './settings.js';
import {Sidebar} from './sidebar.js';
import {ChatSocket} from './socket.js';
import {StatusTab} from './status.js';

const root = document.documentElement;
// Both tabs, from where the page was loaded: its address changes.
const pages = {chat: new URL(root.dataset.chat, location.href),
  status: new URL(root.dataset.status, location.href)};
for (const place of document.querySelectorAll('[data-icon]')) {
  place.prepend(icon(place.dataset.icon));
}

const socket = new ChatSocket(event => conversation.heard(event), isThere => {
  $('offline').hidden = isThere;
});
const models = new Models(name => conversation.chooseModel(name),
  ({sees}) => composer.see(sees));
const conversation = new Conversation(socket, models, {
  changed(session, isNew) {
    if (isNew) {
      history.replaceState(null, '', `${pages.chat}#${encodeURIComponent(session.id)}`);
      document.title = `${session.title} · llmkit`;
      sidebar.current = session.id;
    }
    clearTimeout(listing);
    listing = setTimeout(() => sidebar.load(), isNew ? 0 : 400);
  },
  gone() {
    note('This conversation is not here any more.', true);
    composer.carry();
    sidebar.choose(null);
    if (shown.view === 'chat') history.replaceState(null, '', pages.chat);
    return conversation.open(null);
  },
});
let listing = 0;
const settings = new Settings(values => conversation.configure(values));
const composer = new Composer({
  send: (text, pictures) => conversation.send(text, pictures),
  stop: () => conversation.stop(),
  last: () => conversation.editLast(),
});
conversation.bind({settings, composer});
const sidebar = new Sidebar(id => go(id), id => { if (id === conversation.wanted) go(null); });
const status = new StatusTab();

// Addresses: #sess_… is a conversation, #status the second tab; in Jupyter that has its own.
function wanted() {
  const mark = location.hash.slice(1);
  if (mark === 'status') return {view: 'status'};
  if (isSession(mark)) return {view: 'chat', id: mark};
  const place = pathname => pathname.replace(/\/$/, '');
  const isStatus = !pages.status.hash && place(pages.status.pathname) === place(location.pathname);
  return {view: isStatus ? 'status' : 'chat', id: null};
}

let shown = {};

function follow() {
  const {view, id} = wanted();
  const isFirst = !conversation.visit, isOther = shown.view !== view;
  shown = {view, id};
  $('chat').hidden = view !== 'chat';
  $('status').hidden = view !== 'status';
  $('model').hidden = $('tune').hidden = view !== 'chat';
  for (const name of ['chat', 'status']) {
    if (name === view) $(`tab-${name}`).setAttribute('aria-current', 'page');
    else $(`tab-${name}`).removeAttribute('aria-current');
  }
  status.show(view === 'status');
  drawer(false);
  if (view === 'status') { document.title = 'Models · llmkit'; return; }
  if (isFirst || id !== conversation.wanted) {
    sidebar.choose(id);
    conversation.open(id);
  } else if (!isOther) return;
  else conversation.name();
  if (matchMedia('(min-width: 48rem)').matches) composer.area.focus({preventScroll: true});
}

function go(id) {
  history.pushState(null, '', id ? `${pages.chat}#${encodeURIComponent(id)}` : pages.chat);
  follow();
}

function begin() {
  go(null);
  composer.area.focus();
}

for (const name of ['chat', 'status']) {
  const tab = $(`tab-${name}`);
  tab.href = pages[name];
  tab.addEventListener('click', event => {
    if (event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    const id = conversation.wanted ?? conversation.missing;
    const mark = name === 'chat' && id ? '#' + encodeURIComponent(id) : '';
    history.pushState(null, '', pages[name] + mark);
    follow();
  });
}
window.addEventListener('popstate', follow);
window.addEventListener('hashchange', follow);
document.querySelector('.skip').addEventListener('click', event => {
  event.preventDefault();
  (shown.view === 'chat' ? composer.area : $('live')).focus();
});
$('new').addEventListener('click', begin);
$('tune').addEventListener('click', async () => {
  if (await conversation.settled()) settings.open(conversation.tree.path().length > 0);
});

// On a narrow screen the list of conversations is a drawer.
function drawer(isOpen) {
  const isNarrow = matchMedia('(max-width: 47.99rem)').matches;
  root.classList.toggle('drawer-open', isOpen && isNarrow);
  $('side').inert = isNarrow && !isOpen;
  $('main').inert = isNarrow && isOpen;
  $('scrim').hidden = !(isOpen && isNarrow);
  $('menu').setAttribute('aria-expanded', String(isOpen && isNarrow));
}
$('menu').addEventListener('click', () => { drawer(true); $('new').focus(); });
$('scrim').addEventListener('click', () => { drawer(false); $('menu').focus(); });
matchMedia('(max-width: 47.99rem)').addEventListener('change', () => drawer(false));

// The theme: the system's, until another is chosen.
const systemDark = matchMedia('(prefers-color-scheme: dark)');
const isDark = () => (root.dataset.theme || (systemDark.matches ? 'dark' : 'light')) === 'dark';
function showTheme() {
  $('theme').replaceChildren(icon(isDark() ? 'sun' : 'moon'));
  $('theme').setAttribute('aria-label', isDark() ? 'Light theme' : 'Dark theme');
  $('theme').title = isDark() ? 'Light theme' : 'Dark theme';
}
$('theme').addEventListener('click', () => {
  root.dataset.theme = isDark() ? 'light' : 'dark';
  try {
    localStorage.setItem('llmkit-theme', root.dataset.theme);
  } catch (error) { /* stores nothing */ }
  showTheme();
});
systemDark.addEventListener('change', showTheme);

document.addEventListener('keydown', event => {
  const isTyping = event.target.closest('input, textarea, select');
  const isCommand = event.ctrlKey || event.metaKey;
  if (event.key === 'Escape' && !document.querySelector('dialog[open]')) {
    if (root.classList.contains('drawer-open')) { drawer(false); $('menu').focus(); }
    else if (conversation.isBusy) conversation.stop();
  } else if (event.key.toLowerCase() === 'o' && event.shiftKey && isCommand) {
    event.preventDefault();
    begin();
  } else if (event.key === '/' && !isTyping && !isCommand && shown.view === 'chat') {
    event.preventDefault();
    composer.area.focus();
  }
});

// A server with a key: it is asked for, and kept in this tab only. A hub asks for a login.
onLocked(wasGiven => {
  if ('login' in root.dataset) {
    const here = location.pathname + location.search + location.hash;
    location.assign(address('login?next=' + encodeURIComponent(here)));
    return;
  }
  const dialog = $('lock');
  if (wasGiven) $('lock-note').textContent = 'This is not the key.';
  if (!dialog.open) { dialog.showModal(); $('key').focus(); }
});
$('lock').addEventListener('cancel', event => event.preventDefault());
$('lock-form').addEventListener('submit', async event => {
  event.preventDefault();
  const given = $('key').value;
  $('key').value = '';
  const tried = /^[\x20-\x7e]+$/.test(given) ? given : '?';
  setKey(tried);
  $('lock-note').textContent = '';
  try { await get('status'); } catch (error) {
    if (currentKey() !== tried) return;  // another was given meanwhile
    if (error.status !== 401) $('lock-note').textContent = error.message;
    if (error.status === 401) setKey(null);
    return;
  }
  $('lock').close();
  start();
});

// ?model=NAME: which one a new conversation begins with.
const asked = new URLSearchParams(location.search).get('model');

function start() {
  models.load();
  sidebar.load();
  follow();
  if (asked && conversation.wanted === null) models.set(asked);
}

showTheme();
if ('locked' in root.dataset && !currentKey()) {
  drawer(false);
  $('lock').showModal();
  $('key').focus();
} else start();
root.classList.add('ready');
