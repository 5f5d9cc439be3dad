// The box in which a message is written, with the pictures and text files that go along.

import {$, el, icon, iconButton, note} from './dom.js';
import {isPicture, taken} from './pictures.js';

const MAX_FILE = 1 << 20, MAX_FILES = 10, SAVE_MS = 400;
const MAX_KEPT = 200000;  // characters that outlive the page
const LANGUAGES = {py: 'python', js: 'javascript', ts: 'typescript', md: 'markdown', sh: 'bash',
  rs: 'rust', rb: 'ruby', yml: 'yaml', txt: '', log: '', csv: ''};

const placeOf = session => `llmkit-draft-${session || 'new'}`;

export class Composer {
  // `send(text, pictures)` sends, `stop()` stops, `last()` edits what was said last.
  constructor({send, stop, last}) {
    this.area = $('message');
    this.files = [];
    this.stop = stop;
    this.drafts = new Map();  // what is written and attached elsewhere, by its place
    this.unsent = new Map();  // what is on its way, by its place
    this.isBusy = false;
    this.submit = () => {
      if (this.isBusy) return;
      const text = this.content(), pictures = this.pictures();
      this.given = {text: this.area.value, files: this.files};
      if (text || pictures.length) send(text, pictures);
    };
    $('composer').addEventListener('submit', event => {
      event.preventDefault();
      if (this.isBusy) stop(); else this.submit();
    });
    this.area.addEventListener('keydown', event => {
      if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.submit();
      } else if (event.key === 'ArrowUp' && !this.area.value) {
        if (last()) event.preventDefault();
      }
    });
    this.area.addEventListener('input', () => this.changed());
    this.area.addEventListener('paste', event => {
      const pictures = [...event.clipboardData.files].filter(isPicture);
      if (!pictures.length || !this.sees) return;
      event.preventDefault();
      this.take(pictures);
    });
    $('attach').addEventListener('click', () => $('file').click());
    $('file').addEventListener('change', () => {
      this.take([...$('file').files]);
      $('file').value = '';
    });
    const view = $('chat');
    view.addEventListener('dragover', event => {
      if (event.dataTransfer.types.includes('Files')) {
        event.preventDefault();
        view.classList.add('dropping');
      }
    });
    for (const name of ['dragleave', 'drop']) {
      view.addEventListener(name, () => view.classList.remove('dropping'));
    }
    view.addEventListener('drop', event => {
      if (!event.dataTransfer.files.length) return;
      event.preventDefault();
      this.take(event.dataTransfer.files);
    });
    this.restore(null);
  }

  changed() {
    if (!CSS.supports('field-sizing', 'content')) {
      this.area.style.height = 'auto';
      this.area.style.height = `${Math.min(this.area.scrollHeight, 260)}px`;
    }
    clearTimeout(this.saving);
    this.saving = setTimeout(() => this.keep(), SAVE_MS);
    this.show();
  }

  show() {
    const button = $('send');
    button.replaceChildren(icon(this.isBusy ? 'stop' : 'send'));
    button.setAttribute('aria-label', this.isBusy ? 'Stop' : 'Send');
    button.title = this.isBusy ? 'Stop (Esc)' : 'Send (Enter)';
    button.disabled = !this.isBusy && !this.area.value.trim() && !this.files.length;
  }

  busy(isBusy) {
    this.isBusy = isBusy;
    this.show();
  }

  // What is written stays, per conversation, until it is sent; text also when the page is loaded
  // anew, in this tab only.
  keep() { this.store(this.place, this.area.value, this.files); }

  store(place, text, files) {
    clearTimeout(this.saving);
    this.drafts.set(place, {text, files});
    const kept = [this.unsent.get(place), text].filter(Boolean).join('\n\n');
    try {
      if (kept) sessionStorage.setItem(place, kept.slice(0, MAX_KEPT));
      else sessionStorage.removeItem(place);
    } catch (error) { /* full, or stores nothing */ }
  }

  draft(place) {
    if (this.drafts.has(place)) return this.drafts.get(place);
    let text = '';
    try { text = sessionStorage.getItem(place) || ''; } catch (error) { /* stores nothing */ }
    return {text, files: []};
  }

  get place() { return this.spot.place; }

  restore(session) {
    if (this.spot) this.keep();
    this.spot = {place: placeOf(session)};  // the same one when the conversation begins
    this.put(this.draft(this.place));
  }

  put({text, files}) {
    this.area.value = text;
    this.files = files;
    this.showFiles();
    this.changed();
  }

  // The conversation has begun: what is written belongs to it.
  move(session) {
    const before = this.place, unsent = this.unsent.get(before);
    this.unsent.delete(before);
    this.store(before, '', []);
    this.spot.place = placeOf(session);
    if (unsent) this.unsent.set(this.place, unsent);
    this.keep();
  }

  // The conversation is not here any more: what is written for it may go into a new one.
  carry() {
    const before = this.draft(placeOf(null)), files = [...before.files, ...this.files];
    const text = [before.text, this.area.value].filter(Boolean).join('\n\n');
    this.move(null);
    this.put({text, files});
  }

  // A message that could not be sent comes back to its conversation, before what is written there.
  giveBack(text, pictures, session) {
    const place = placeOf(session);
    this.arrived(session);
    const draft = this.draft(place);
    const files = pictures.map(picture => ({name: 'Picture', picture}));
    this.store(place, [text, draft.text].filter(Boolean).join('\n\n'),
      [...files, ...draft.files]);
    if (place === this.place) this.put(this.draft(place));
  }

  // Whether the model takes pictures.
  see(sees) {
    this.sees = sees;
    const label = sees ? 'Attach pictures or text files' : 'Attach text files';
    $('attach').setAttribute('aria-label', label);
    $('attach').title = label;
  }

  // Files take a while to be read: they are for the conversation that was shown before.
  async take(files) {
    const {spot} = this, isShown = () => spot.place === this.place;
    const add = file => {
      if (isShown()) { this.files = [...this.files, file]; return; }
      const draft = this.draft(spot.place);
      this.store(spot.place, draft.text, [...draft.files, file]);
    };
    for (const file of files) {
      if (isShown() && this.files.length >= MAX_FILES) {
        note(`At most ${MAX_FILES} files.`, true);
        break;
      }
      if (isPicture(file)) {
        if (!this.sees) { note('This model takes no pictures.', true); continue; }
        try {
          add({name: file.name, picture: await taken(file)});
        } catch (error) { note(error.message, true); }
        continue;
      }
      if (file.size > MAX_FILE) { note(`${file.name} is larger than 1 MB.`, true); continue; }
      const text = await file.text();
      if (text.includes('\0') || text.includes('\ufffd')) {
        note(`${file.name} is no text file.`, true);
        continue;
      }
      add({name: file.name, text});
    }
    if (!isShown()) return;
    this.showFiles();
    this.area.focus();
  }

  showFiles() {
    $('files').hidden = !this.files.length;
    $('files').replaceChildren(...this.files.map(file => el('li', {},
      file.picture ? el('img', {src: file.picture.src, alt: ''}) : icon('file'),
      el('span', {}, file.name), iconButton('close', `Remove ${file.name}`, () => {
        this.files = this.files.filter(each => each !== file);
        this.showFiles();
        this.area.focus();
      }))));
    this.show();
  }

  pictures() { return this.files.flatMap(file => file.picture || []); }

  content() {
    const parts = [this.area.value.trim()].filter(Boolean);
    for (const {name, text, picture} of this.files) {
      if (picture) continue;
      const end = name.split('.').pop().toLowerCase();
      // A fence that is longer than any in the file.
      const longest = Math.max(2, ...(text.match(/`{3,}/g) || []).map(ticks => ticks.length));
      const fence = '`'.repeat(longest + 1);
      const code = text.replace(/\n$/, '');
      parts.push(`${name}:\n${fence}${LANGUAGES[end] ?? end}\n${code}\n${fence}`);
    }
    return parts.join('\n\n');
  }

  // What was given is on its way. What has been written or attached since stays.
  sent() {
    const {text, files} = this.given, now = this.area.value;
    this.unsent.set(this.place, text);
    this.put({text: now.startsWith(text) ? now.slice(text.length).trimStart() : now,
      files: this.files.filter(file => !files.includes(file))});
    this.keep();
  }

  // What was on its way to a conversation is there, or is given back.
  arrived(session) {
    const place = placeOf(session);
    this.unsent.delete(place);
    if (place === this.place) this.keep();
    else if (this.drafts.has(place)) {
      const {text, files} = this.drafts.get(place);
      this.store(place, text, files);
    }
  }
}
