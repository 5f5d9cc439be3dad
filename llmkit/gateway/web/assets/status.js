// The second tab: models, memory and requests of this server, and what administrators do with them.

import {currentKey, events, get, getText, post, url} from './api.js';
import {$, ask, el, note} from './dom.js';

const POLL_MS = 2000;

export class StatusTab {
  constructor() {
    this.isShown = false;
    this.last = $('state').innerHTML;
    this.timer = setInterval(() => {
      if (this.isShown && $('live').checked && !document.hidden) this.load();
    }, POLL_MS);
    $('admin-rows').addEventListener('click', event => {
      const button = event.target.closest('button[data-action]');
      if (button) this.act(button.dataset.action, button.dataset.model);
    });
    $('pull').addEventListener('submit', event => { event.preventDefault(); this.pull(); });
  }

  show(isShown) {
    this.isShown = isShown;
    if (isShown) this.load();
  }

  async load() {
    const sent = currentKey();
    try {
      const text = await getText('status?part=1&no_track_activity=1');
      if (sent !== currentKey()) return;
      $('status-note').textContent = '';
      // Replacing the content would take the focus away from whatever has it.
      if (text !== this.last && !$('state').contains(document.activeElement)) {
        $('state').innerHTML = text;  // rendered by the server, which escapes what is not its own
        this.last = text;
      }
    } catch (error) {
      $('status-note').textContent = error.status === 401 ? ''
        : `${error.message} These numbers are old.`;
    }
    await this.loadAdmin();
  }

  // What the caller may do, as far as the server says so.
  async loadAdmin() {
    let state;
    try { state = await get('status?no_track_activity=1'); } catch (error) { return; }
    const can = name => state.actions.includes(`/admin/${name}`);
    const isServer = can('models/load');
    const models = isServer ? state.offered
      : state.models.map(({id}) => ({name: id, phase: 'ready'}));
    const hasModels = can('models/unload') && models.length > 0;
    $('admin').hidden = !hasModels && !can('storage/pull');
    $('admin-models').hidden = !hasModels;
    $('pull').hidden = !can('storage/pull');
    const rows = JSON.stringify(models.map(({name, phase, reason}) => [name, phase, reason]));
    if (rows === this.rows || $('admin-rows').contains(document.activeElement)) return;
    this.rows = rows;
    $('admin-rows').replaceChildren(...models.map(model => this.row(model, isServer)));
  }

  row({name, phase, reason}, isServer) {
    const button = (action, label) => {
      const made = el('button', {type: 'button', class: 'plain small',
        'aria-label': `${label} ${name}`}, label);
      made.dataset.action = action;
      made.dataset.model = name;
      return made;
    };
    const isIn = ['ready', 'loading', 'restarting'].includes(phase);
    return el('tr', {}, el('td', {}, el('code', {}, name)),
      el('td', {}, el('i', {class: `dot ${phase}`}), ` ${phase}`,
        reason ? el('small', {}, reason) : ''),
      el('td', {}, el('div', {class: 'row'},
        isIn ? button('unload', 'Unload') : button('load', 'Load'),
        isIn && isServer ? button('reload', 'Reload') : null)));
  }

  async act(action, model) {
    if (action === 'unload' && !await ask({title: `Unload ${model}?`, action: 'Unload',
      text: 'Requests that it is answering end first.'})) return;
    try {
      await post(url`admin/models/${action}`, {model, wait: false});
      note(`${{load: 'Loading', unload: 'Unloading', reload: 'Reloading'}[action]} ${model}.`);
    } catch (error) { note(error.message, true); }
    document.activeElement?.blur();
    this.load();
  }

  async pull() {
    const model = $('pull-name').value.trim(), said = $('pull-said');
    if (!model) return;
    $('pull-button').disabled = true;
    try {
      for await (const update of events('POST', 'admin/storage/pull', {model})) {
        if (update.error) throw new Error(update.error.message || update.error);
        const {phase, done, total} = update;
        said.textContent = phase === 'done' ? `${update.model} is here.`
          : total ? `${phase}: ${Math.round(100 * (done || 0) / total)} %` : phase;
      }
      $('pull-name').value = '';
    } catch (error) { said.textContent = error.message; }
    $('pull-button').disabled = false;
    this.load();
  }
}
