const live = document.getElementById('live');
const main = document.getElementById('state');
const note = document.getElementById('note');
const lock = document.getElementById('lock');  // only on the page that asks for the key
const field = document.getElementById('key');
const address = location.pathname.replace(/\/?$/, '/') + 'status?part=1&no_track_activity=1';

// The key lives in this tab only. Where the browser stores nothing, it is asked for each time.
function storedKey() {
  try { return sessionStorage.getItem('llmkit-key'); } catch (error) { return null; }
}
function storeKey(value) {
  try {
    if (value === null) sessionStorage.removeItem('llmkit-key');
    else sessionStorage.setItem('llmkit-key', value);
  } catch (error) {}
}

let shown = '';
let key = lock ? storedKey() : null;

async function load() {
  const sent = key;
  const headers = key ? {Authorization: 'Bearer ' + key} : {};
  try {
    const reply = await fetch(address, {credentials: 'same-origin', headers});
    const text = reply.ok ? await reply.text() : '';
    if (sent !== key) return;
    note.textContent = reply.ok ? '' : reply.status === 401 && lock ? 'This is not the key.'
      : 'The server refuses to say more (' + reply.status + '); these numbers are old.';
    if (lock) {
      lock.hidden = reply.ok;
      if (reply.ok && key) storeKey(key);
      else if (reply.status === 401) { key = null; storeKey(null); }
    }
    // Replacing the content would take the focus away from whatever has it.
    if (text && text !== shown && !main.contains(document.activeElement)) {
      main.innerHTML = text;
      shown = text;
    }
  } catch (error) { note.textContent = 'The server does not answer; these numbers are old.'; }
}

if (lock) lock.addEventListener('submit', event => {
  event.preventDefault();
  key = /^[\x20-\x7e]+$/.test(field.value) ? field.value : '?';
  field.value = '';
  load();
});
if (key) load();
setInterval(() => { if (live.checked && !document.hidden && (!lock || key)) load(); }, 2000);
