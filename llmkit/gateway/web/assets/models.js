// The models of this server: which there are, their state, and the one that is chosen.

import {get} from './api.js';
import {$, el} from './dom.js';
import {openMenu} from './menu.js';

const POLL_MS = 3000;
const WORDS = {ready: 'ready', loading: 'loading', unloaded: 'loads when asked', failed: 'failed',
  unloading: 'unloading', draining: 'unloading'};

export class Models {
  // `choose(name)` hears of another choice, `shown(models)` of whatever is shown.
  constructor(choose, shown = () => {}) {
    this.shown = shown;
    this.all = [];
    this.chosen = '';
    this.choose = choose;
    this.button = $('model');
    this.button.addEventListener('click', async () => {
      await this.load();
      this.open();
    });
    setInterval(() => {
      if (!document.hidden && this.all.some(model => model.phase === 'loading')) this.load();
    }, POLL_MS);
  }

  async load() {
    let state;
    try { state = await get('status?no_track_activity=1'); } catch (error) { return; }
    const found = new Map();
    for (const model of state.offered) {
      found.set(model.name, {name: model.name, phase: model.phase, share: model.loaded,
        isDefault: model.is_default, reason: model.reason});
    }
    for (const model of state.models) {
      const known = found.get(model.id) || {name: model.id, phase: 'ready'};
      const exact = `${model.id}@${model.kernel ?? model.pid}`;
      found.set(model.id, {...known, exact, context: model.n_ctx, place: model.place,
        quantization: model.quantization, inputs: model.inputs});
    }
    this.all = [...found.values()];
    this.show();
  }

  // The one that is chosen by its name, or by its exact one, as JupyterLab's sidebar does.
  get named() {
    return this.all.find(model => model.name === this.chosen || model.exact === this.chosen);
  }

  get current() {
    return this.named
      || this.all.find(model => model.isDefault)
      || this.all.find(model => model.phase === 'ready') || this.all[0] || null;
  }

  // What a turn is to name: nothing if the conversation, or the server, decides.
  get wanted() { return this.chosen || this.current?.name || null; }

  get sees() { return Boolean(this.current?.inputs?.includes('image')); }

  set(name) {
    this.chosen = name || '';
    this.show();
  }

  show() {
    const model = this.current;
    const isGone = this.chosen && this.all.length && !this.named;
    const phase = isGone ? 'failed' : model?.phase || 'unloaded';
    this.button.querySelector('.dot').className = `dot ${phase}`;
    $('model-name').textContent = isGone ? this.chosen : model?.name || 'No model';
    const said = isGone ? 'not here' : model ? detail(model) : 'none is loaded';
    this.button.setAttribute('aria-label',
      `Model: ${$('model-name').textContent}, ${said}`);
    this.button.title = said;
    $('no-model').hidden = this.all.length > 0;
    this.shown(this);
  }

  open() {
    if (!this.all.length) return;
    openMenu(this.button, this.all.map(model => ({
      label: model.name, detail: detail(model), mark: model.phase,
      isChosen: model === this.current,
      action: () => this.choose(model.name),
    })), 'Model');
  }

  // How full a model's context is after an answer.
  context(usage, name) {
    const box = $('context');
    const size = (this.all.find(model => model.name === name) || this.current)?.context;
    const used = usage ? (usage.prompt_tokens || 0) + (usage.completion_tokens || 0) : 0;
    box.hidden = !size || !used;
    if (box.hidden) return;
    const share = Math.min(1, used / size);
    box.replaceChildren(el('meter', {min: 0, max: 1, high: 0.85, value: share,
      'aria-label': 'Context in use'}),
    el('span', {}, `${used.toLocaleString('en')} of ${size.toLocaleString('en')} tokens`));
  }
}

function detail(model) {
  const state = model.phase === 'loading' && model.share
    ? `loading ${Math.round(model.share * 100)} %` : WORDS[model.phase] || model.phase;
  const context = model.context && `${model.context.toLocaleString('en')} tokens`;
  return [state, model.quantization, context, model.place].filter(Boolean).join(' · ');
}
