// One message on the page: what it says, what it took, and what can be done with it.

import {copy, el, icon, iconButton} from './dom.js';
import {shown} from './pictures.js';
import {textOf} from './tree.js';

const LONG = 4000;  // characters of a question that are shown folded
const WAIT_MS = 150;  // how long text may wait for its rendered form
// A block of so much HTML is laid out anew for every change: it changes only so often while it
// grows, its text and its rendered form.
const BIG = 6000, TEXT_MS = 100, REST_MS = 300;

// Views that change in the next frame.
const dirty = new Set();
let afterFrame = () => {};
export function onFrame(action) { afterFrame = action; }

function schedule(view) {
  if (!dirty.size) requestAnimationFrame(flushAll);
  dirty.add(view);
}

function flushAll() {
  const views = [...dirty];
  dirty.clear();
  for (const view of views) view.flush();
  afterFrame();
}

// Rendered by the server, which lets through nothing that runs or loads.
function setHtml(box, html) {
  box.innerHTML = html;
  for (const pre of box.querySelectorAll('pre')) {
    const language = pre.dataset.language || 'text';
    pre.setAttribute('aria-label', `Code, ${language}`);
    pre.setAttribute('role', 'region');
    const button = iconButton('copy', 'Copy code', () => copy(pre.textContent, button));
    const frame = el('div', {class: 'code'},
      el('div', {class: 'code-head'}, el('span', {}, language), button));
    pre.replaceWith(frame);
    frame.append(pre);
  }
}

export class MessageView {
  // `actions`: edit(message, text), regenerate(message), turn(message, step).
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.element = el('article', {class: `message ${message.role}`});
    this.element.dataset.id = message.id;
    this.text = textOf(message);
    this.reasoning = message.reasoning || '';
    this.calls = message.tool_calls || [];
    this.build();
  }

  get isStreaming() { return this.stream !== undefined; }

  build() {
    const {message} = this;
    this.prose = el('div', {class: message.role === 'assistant' ? 'prose' : 'text'});
    this.thinking = el('div', {class: 'thinking'});
    this.thought = el('details', {class: 'fold', hidden: true},
      el('summary', {}, icon('think'), el('span', {}, 'Reasoning'), icon('down')), this.thinking);
    this.called = el('div', {class: 'calls'});
    this.trouble = el('p', {class: 'trouble', hidden: true});
    this.foot = el('div', {class: 'foot'});
    const name = {user: 'You', system: 'System prompt', tool: 'Tool result'}[message.role]
      || message.model || 'Model';
    const heading = el('h2', {class: message.role === 'assistant' ? 'name' : 'offscreen'}, name);
    if (message.role === 'system' || message.role === 'tool') {
      this.body = el('details', {class: 'fold'}, el('summary', {},
        icon(message.role === 'tool' ? 'tool' : 'tune'), el('span', {}, name), icon('down')),
        this.prose);
    } else this.body = this.prose;
    const pictures = shown(message);
    const seen = pictures.length ? [el('div', {class: 'pictures'}, ...pictures)] : [];
    this.element.append(heading, ...seen, this.thought, this.body, this.called, this.trouble,
      this.foot);
    this.showAll();
  }

  showAll() {
    const {message} = this;
    const blocks = message.html === undefined ? null : [].concat(message.html);
    if (message.role === 'assistant' && blocks) {
      this.prose.replaceChildren(...blocks.map(html => {
        const box = el('div', {class: 'block'});
        setHtml(box, html);
        return box;
      }));
    } else if (!this.isStreaming) {
      this.prose.textContent = this.text;
      this.prose.hidden = message.role === 'user' && !this.text;
      if (message.role === 'user' && this.text.length > LONG) this.foldLong();
    }
    this.showReasoning();
    this.showCalls();
    this.showTrouble();
    this.showFoot();
  }

  foldLong() {
    this.prose.classList.add('long');
    const button = el('button', {type: 'button', class: 'plain small', 'aria-expanded': 'false',
      onclick: () => {
        const isOpen = !this.prose.classList.toggle('long');
        button.setAttribute('aria-expanded', String(isOpen));
        button.textContent = isOpen ? 'Show less' : 'Show all';
      }}, 'Show all');
    this.prose.after(button);
  }

  showReasoning() {
    this.thought.hidden = !this.reasoning;
    this.thinking.textContent = this.reasoning;
    const isThinking = this.isStreaming && !this.text;
    this.thought.querySelector('span').textContent = isThinking ? 'Thinking…' : 'Reasoning';
  }

  showCalls() {
    this.called.replaceChildren(...this.calls.map(call => {
      const {name, arguments: given} = call.function || call;
      let shown = given;
      try { shown = JSON.stringify(JSON.parse(given), null, 2); } catch (error) { /* unfinished */ }
      return el('details', {class: 'fold call'}, el('summary', {}, icon('tool'),
        el('span', {}, 'Calls ', el('code', {}, name || '')), icon('down')),
      el('pre', {tabIndex: 0, 'aria-label': `Arguments of ${name}`, role: 'region'}, shown || ''));
    }));
  }

  showTrouble(text = '') {
    const {status, finish_reason: reason} = this.message;
    if (!text && !this.isStreaming && this.message.role === 'assistant') {
      if (status === 'partial') text = 'Stopped before its end.';
      else if (reason === 'length') text = 'Cut off at the limit of tokens.';
    }
    this.trouble.textContent = text;
    this.trouble.hidden = !text;
  }

  showFoot() {
    const {message, actions} = this;
    const siblings = actions.siblings(message);
    const at = siblings.indexOf(message.id);
    const parts = [];
    if (siblings.length > 1) {
      parts.push(el('span', {class: 'branches', role: 'group', 'aria-label': 'Branches'},
        iconButton('left', 'Previous branch', () => actions.turn(message, -1),
          {disabled: at === 0}),
        el('span', {}, `${at + 1}/${siblings.length}`),
        iconButton('right', 'Next branch', () => actions.turn(message, 1),
          {disabled: at === siblings.length - 1})));
    }
    if (this.isStreaming) {
      this.live = el('span', {class: 'stats'});
      parts.push(this.live);
    } else {
      const copying = iconButton('copy', 'Copy', () => copy(this.text, copying));
      if (message.role !== 'system') parts.push(copying);
      if (message.role === 'user' || message.role === 'system') {
        parts.push(iconButton('edit', 'Edit', () => this.edit()));
      }
      if (message.role === 'assistant') {
        parts.push(iconButton('again', 'Regenerate', () => actions.regenerate(message)));
        parts.push(el('span', {class: 'stats'}, this.stats()));
      }
    }
    this.foot.replaceChildren(...parts);
  }

  stats() {
    const usage = this.message.usage || {};
    const number = value => Math.round(value).toLocaleString('en');
    const parts = [];
    if (usage.tokens_per_s) parts.push(`${number(usage.tokens_per_s)} tokens/s`);
    if (usage.completion_tokens) parts.push(`${number(usage.completion_tokens)} tokens`);
    if (usage.prompt_tokens) parts.push(`prompt ${number(usage.prompt_tokens)}`);
    if (usage.cached_tokens) parts.push(`${number(usage.cached_tokens)} cached`);
    return parts.join(' · ');
  }

  edit(text = this.text) {
    this.editor?.remove();
    const area = el('textarea', {value: text, 'aria-label': 'Edit the message', rows: 3});
    const done = () => {
      this.editor.remove();
      this.body.hidden = this.foot.hidden = false;
      this.foot.querySelector('[aria-label=Edit]')?.focus();
    };
    const send = () => {
      const given = area.value.trim();
      if (!given) return;
      done();
      this.actions.edit(this.message, given);
    };
    this.editor = el('form', {class: 'editor'}, area, el('div', {class: 'row end'},
      el('button', {type: 'button', class: 'plain', onclick: done}, 'Cancel'),
      el('button', {class: 'strong'}, this.message.role === 'system' ? 'Save' : 'Send')));
    this.editor.addEventListener('submit', event => { event.preventDefault(); send(); });
    this.editor.addEventListener('keydown', event => {
      if (event.key === 'Escape') { event.stopPropagation(); done(); }
      if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    this.body.hidden = this.foot.hidden = true;
    this.element.insertBefore(this.editor, this.body);
    area.focus();
  }

  // The answer is being written.
  begin() {
    this.stream = {html: new Map(), blocks: [], lengths: [], rendered: 0,
      renderedAt: performance.now(), tokens: 0, firstAt: 0, calls: false};
    this.text = this.reasoning = '';
    this.calls = [];
    this.element.classList.add('streaming');
    this.element.setAttribute('aria-busy', 'true');
    this.prose.replaceChildren();
    this.showReasoning();
    this.showCalls();
    this.showTrouble();
    this.showFoot();
    schedule(this);
  }

  heard(event) {
    const {stream} = this;
    if (!stream) return;
    if (event.type === 'delta' || event.type === 'reasoning') {
      const now = performance.now();
      if (!stream.firstAt) { stream.firstAt = now; stream.firstSeq = event.seq; }
      stream.tokens = event.seq - stream.firstSeq;
      if (event.type === 'delta') {
        this.text += event.text;
        stream.lengths.push([event.seq, this.text.length]);
      } else this.reasoning += event.text;
    } else if (event.type === 'html') {
      stream.html.set(event.index, event);
    } else if (event.type === 'call') {
      this.calls = [...this.calls, event.call];
      stream.calls = true;
    }
    if (!stream.isBig) schedule(this);
    else stream.timer ||= setTimeout(() => { stream.timer = 0; schedule(this); }, TEXT_MS);
  }

  flush() {
    const {stream} = this;
    if (!stream) return;
    if (this.isDue()) this.showBlocks();
    this.showTail();
    if (this.reasoning !== this.thinking.textContent || this.text) this.showReasoning();
    if (stream.calls) { this.showCalls(); stream.calls = false; }
    const seconds = (performance.now() - stream.firstAt) / 1000;
    const isKnown = stream.tokens > 3 && seconds > 0.3;
    const rate = isKnown ? `${Math.round(stream.tokens / seconds)} tokens/s` : '';
    if (this.live && this.live.textContent !== rate) this.live.textContent = rate;
  }

  // A large block that grows is left alone for a while: what came since stands behind it.
  isDue() {
    const {html, renderedAt} = this.stream;
    const [first] = html.values();
    if (!first) return false;
    const rest = renderedAt + REST_MS - performance.now();
    if (html.size > 1 || first.html.length < BIG || rest <= 0) return true;
    setTimeout(() => this.stream && schedule(this), rest);
    return false;
  }

  showBlocks() {
    const {stream} = this;
    if (stream.tail?.parentElement === this.prose) stream.tail.remove();  // it is no block
    for (const {index, html, seq} of stream.html.values()) {
      while (this.prose.children.length <= index) this.prose.append(el('div', {class: 'block'}));
      setHtml(this.prose.children[index], html);
      stream.blocks[index] = html;
      stream.isBig = html.length > BIG;
      while (stream.lengths.length && stream.lengths[0][0] <= seq) {
        stream.rendered = stream.lengths.shift()[1];
      }
    }
    stream.html.clear();
    stream.renderedAt = performance.now();
  }

  // What the server has not rendered yet, as it stands: in long blocks it takes its time.
  showTail() {
    const {stream} = this;
    const waiting = this.text.slice(stream.rendered);
    const isLate = performance.now() - stream.renderedAt > WAIT_MS;
    if (!waiting) {
      stream.tail?.remove();
      return;
    }
    let place = this.prose.lastElementChild;
    const code = place?.querySelector('pre code');
    if (!isLate && !code) { setTimeout(() => this.stream && schedule(this), WAIT_MS); return; }
    if (code) place = code;
    else {
      while (place?.lastElementChild && place.lastElementChild !== stream.tail
        && !place.lastElementChild.closest('math, table')) place = place.lastElementChild;
    }
    stream.tail ||= el('span', {class: 'tail'});
    if (stream.tail.textContent !== waiting) stream.tail.textContent = waiting;
    place ||= this.prose;
    if (stream.tail.parentElement !== place) place.append(stream.tail);
  }

  // The answer is there, or what there is of it; `error` says why not.
  end(message, error = null) {
    if (this.isStreaming) {
      this.showBlocks();
      this.stream.tail?.remove();
      const {blocks, rendered} = this.stream, isRendered = rendered >= this.text.length;
      this.stream = undefined;
      const {html, ...rest} = message || {};
      Object.assign(this.message, rest);
      this.text = textOf(this.message);
      // It may be shown again, after another branch.
      if (html !== undefined || isRendered) this.message.html = html ?? blocks;
      else if (!isRendered) this.prose.append(el('div', {class: 'block raw'}, this.text));
      this.reasoning = this.message.reasoning || this.reasoning;
      this.calls = this.message.tool_calls || this.calls;
    }
    this.element.classList.remove('streaming');
    this.element.removeAttribute('aria-busy');
    this.element.querySelector('h2.name')?.replaceChildren(this.message.model || 'Model');
    this.showReasoning();
    this.showCalls();
    this.showTrouble(error ? error.message : '');
    this.trouble.classList.toggle('error', Boolean(error));
    this.showFoot();
  }
}
