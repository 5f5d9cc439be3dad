// The drawer with the system prompt and how answers are sampled. Empty means the server's default.

import {$, el} from './dom.js';

const FIELDS = [
  ['temperature', 'Temperature', 0, 2, 0.05, 'Higher is more varied; 0 repeats itself.'],
  ['top_p', 'Top p', 0, 1, 0.01, 'Only the likeliest tokens that make up this share.'],
  ['top_k', 'Top k', 0, 500, 1, 'Only so many of the likeliest tokens; 0 is all.'],
  ['min_p', 'Min p', 0, 1, 0.01, 'No token below this share of the likeliest one.'],
  ['max_tokens', 'Longest answer', 1, 1000000, 1, 'In tokens.'],
  ['repetition_penalty', 'Repetition penalty', 0.5, 2, 0.01, '1 is none.'],
  ['seed', 'Seed', 0, 4294967295, 1, 'The same seed gives the same answer.'],
];
const EFFORTS = ['', 'none', 'low', 'medium', 'high'];

export class Settings {
  // `change({settings, system})` hears what was saved.
  constructor(change) {
    this.values = {};
    this.system = '';
    this.opened = {system: '', text: ''};  // as it was given, and as the page shows it
    this.change = change;
    this.dialog = $('settings');
    const rows = FIELDS.map(([name, label, min, max, step, hint]) => el('div', {class: 'field'},
      el('label', {htmlFor: `set-${name}`}, label),
      el('input', {id: `set-${name}`, type: 'number', min, max, step, placeholder: 'default',
        'aria-describedby': `hint-${name}`}),
      el('small', {id: `hint-${name}`}, hint)));
    rows.push(el('div', {class: 'field'}, el('label', {htmlFor: 'set-effort'}, 'Reasoning effort'),
      el('select', {id: 'set-effort', 'aria-describedby': 'hint-effort'},
        ...EFFORTS.map(value => el('option', {value}, value || 'default'))),
      el('small', {id: 'hint-effort'}, 'Of models that reason.')));
    $('sampling').append(...rows);
    $('settings-form').addEventListener('submit', event => {
      event.preventDefault();
      this.save();
    });
    for (const name of ['settings-cancel', 'settings-close']) {
      $(name).addEventListener('click', () => this.dialog.close());
    }
    $('settings-reset').addEventListener('click', () => this.fill({}, $('system').value));
    this.dialog.addEventListener('click', event => {
      if (event.target === this.dialog) this.dialog.close();
    });
  }

  set(values, system) {
    this.values = values || {};
    this.system = system || '';
    const changed = Object.keys(this.values).length + (this.system ? 1 : 0);
    $('tune').classList.toggle('has-some', changed > 0);
  }

  fill(values, system) {
    for (const [name] of FIELDS) $(`set-${name}`).value = values[name] ?? '';
    $('set-effort').value = values.reasoning_effort ?? '';
    $('system').value = system;
  }

  // `begins` says that another system prompt begins a new branch.
  open(begins) {
    $('system-hint').hidden = !begins;
    this.show(this.values, this.system);
    $('system').focus();
  }

  // What was given could not be saved.
  reopen({settings, system}) {
    if (!this.dialog.open) this.show(settings, system);
  }

  show(values, system) {
    this.fill(values, system);
    this.opened = {system, text: $('system').value.trim()};
    this.dialog.showModal();
  }

  close() { this.dialog.close(); }

  save() {
    const values = {...this.values};  // what other programs set, tools say, stays
    for (const [name] of FIELDS) {
      const given = $(`set-${name}`).value;
      if (given === '') delete values[name];
      else values[name] = Number(given);
    }
    if ($('set-effort').value) values.reasoning_effort = $('set-effort').value;
    else delete values.reasoning_effort;
    this.dialog.close();
    // The box has its own ends of lines: what nobody has changed stays as it was given.
    const text = $('system').value.trim();
    const system = text === this.opened.text ? this.opened.system : text;
    this.change({settings: values, system});
  }
}
