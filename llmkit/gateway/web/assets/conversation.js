// The conversation that is shown: loads it, sends, edits, regenerates, and turns to other branches.

import {ApiError, get, isSession, ofSession, patch, post, url} from './api.js';
import {$, note, say} from './dom.js';
import {contentOf, forget, mediaOf, sendable} from './pictures.js';
import {Thread} from './thread.js';
import {Tree} from './tree.js';

const TITLE = 60, SAID = 600;
// Messages that are loaded at first, at once later, and without being scrolled to.
const FIRST = 60, MORE = 500, EAGER = 5000;
const RETRIES = 3, RETRY_MS = 1000;

export class Conversation {
  // `parts`: the socket's, models, settings, composer; `changed(session)` hears of new ones.
  constructor(socket, models, changed) {
    this.socket = socket;
    this.models = models;
    this.changed = changed;
    this.tree = new Tree();
    this.thread = new Thread(this.tree, {
      edit: (message, text) => this.edit(message, text),
      regenerate: message => this.regenerate(message),
      turn: (message, step) => this.turn(message, step),
      reachTop: () => this.loadEarlier(),
    });
    this.session = this.opening = null;
    this.draft = {settings: {}, system: ''};  // of a conversation that has not begun
    this.turns = new Map();  // turn → the id of its reply
    this.early = new Map();  // events of turns whose reply is not on the page yet
    this.round = 0;
    this.rest = null;  // where the earlier messages begin that are not loaded yet
    this.numLocal = 0;
  }

  get id() { return this.session?.id ?? null; }
  // What is shown, or will be once it is loaded.
  get wanted() { return this.opening ?? this.id; }
  get isBusy() { return this.turns.size > 0 || Boolean(this.isSending); }

  bind({settings, composer}) {
    this.settings = settings;
    this.composer = composer;
  }

  // Show another conversation, or a new one for null.
  async open(id) {
    const round = ++this.round;
    this.isSending = false;
    this.turns.clear();
    this.thread.clear();
    forget();
    this.session = null;
    this.opening = id;
    this.rest = null;
    this.tree.replace([], null);
    this.composer.restore(id);
    if (id === null) {
      $('thread').removeAttribute('aria-busy');
      this.show();
      return true;
    }
    $('welcome').hidden = true;
    $('thread').setAttribute('aria-busy', 'true');
    try {
      const [session, latest, {data: [first]}, running] = await Promise.all([
        get(url`v1/sessions/${id}`), this.messages(id, FIRST),
        get(url`v1/sessions/${id}/messages?limit=1`), get(url`v1/sessions/${id}/turns`)]);
      ofSession(id, session);
      const data = [...latest.data];
      let page = latest;
      const isHead = each => each.id === session.head;
      while (page.has_more && session.head && !page.data.some(isHead)) {
        if (round !== this.round) return true;
        page = await this.messages(id, MORE, {after: page.last_id});
        data.push(...page.data);
      }
      if (round !== this.round) return true;
      this.session = session;
      this.first = first;
      this.rest = page.has_more ? page.last_id : null;
      this.tree.replace(data, session.head);
      this.show();
      for (const turn of running.data) this.join(turn);
      this.loadEarlier();
      return true;
    } catch (error) {
      if (round !== this.round) return true;
      if (error.status === 404) return false;
      if (error.status !== 401) this.thread.tell(error.message);
      return true;
    } finally {
      if (round === this.round) {
        this.opening = null;
        $('thread').removeAttribute('aria-busy');
      }
    }
  }

  // A page of a conversation's messages, newest first.
  async messages(id, limit, more = {}) {
    const asked = new URLSearchParams({tree: 1, order: 'desc', render: 'html', limit, ...more});
    const page = await get(url`v1/sessions/${id}/messages` + '?' + asked);
    for (const message of page.data) ofSession(id, {id: message.session});
    return page;
  }

  // Load what was said before, page by page: a long conversation only as far as it is read.
  async loadEarlier() {
    if (this.isLoading) return;
    const round = this.round;
    const isWanted = () => round === this.round && this.rest !== null
      && (this.tree.messages.size < EAGER || (this.thread.isAtTop && !this.isWhole));
    this.isLoading = true;
    for (let failures = 0; isWanted();) {
      try {
        const page = await this.messages(this.id, MORE, {after: this.rest});
        if (round !== this.round) break;
        this.rest = page.has_more ? page.last_id : null;
        this.thread.showEarlier(this.tree.addEarlier(page.data));
        failures = 0;
      } catch (error) {
        if (round !== this.round) break;
        if (++failures > RETRIES) {
          note(`Earlier messages are missing: ${error.message}`, true);
          break;
        }
        await new Promise(resolve => setTimeout(resolve, failures * RETRY_MS));
      }
    }
    this.isLoading = false;
    if (round !== this.round && this.rest !== null) this.loadEarlier();
  }

  // Whether all of what is shown is loaded.
  get isWhole() {
    const [first] = this.tree.path();
    return !first || first.parent === null;
  }

  // The system prompt of what is shown; it may be before all that is loaded.
  systemPrompt() {
    const known = this.isWhole ? this.tree.path() : [this.first];
    return known.find(message => message?.role === 'system')?.content || '';
  }

  show(options) {
    this.thread.show(options);
    this.models.set(this.session?.model || this.models.chosen);
    this.settings.set(this.session ? this.session.settings : this.draft.settings,
      this.session ? this.systemPrompt() : this.draft.system);
    document.title = `${this.session?.title || 'Chat'} · llmkit`;
    this.showUse();
    this.composer.busy(this.isBusy);
  }

  showUse() {
    const last = this.tree.path().findLast(message => message.usage);
    this.models.context(last?.usage, last?.model);
  }

  // A turn that runs already, begun before the page was loaded or in another tab.
  join(turn) {
    const message = this.tree.messages.get(turn.message.id);
    const view = message && this.thread.view(message.id);
    if (!view) return;
    this.turns.set(turn.id, message.id);
    view.begin();
    this.socket.follow(turn.id);
    this.composer.busy(true);
  }

  local(message) {
    return this.tree.add({id: `local-${++this.numLocal}`, status: 'complete', ...message});
  }

  async send(text, pictures = []) {
    const round = this.round, head = this.tree.head;
    const content = contentOf(pictures, text);
    const asked = this.local({role: 'user', content, parent: head});
    this.tree.head = asked.id;
    this.thread.show();
    this.composer.sent();
    await this.begin(round, asked, async () => {
      await this.ensureSession(text || 'Picture');
      const parent = head === null ? {} : {parent: head};
      return {type: 'send', session: this.id, content: sendable(content), ...parent};
    }, () => this.composer.giveBack(text, pictures));
  }

  async ensureSession(text) {
    if (this.session) return;
    const title = text.split('\n')[0].slice(0, TITLE);
    const {settings, system} = this.draft;
    const session = await post('v1/sessions', {title, model: this.models.chosen, settings,
      ...(system ? {system} : {})});
    if (!isSession(session.id)) throw new ApiError(0, 'The server began no conversation.');
    this.session = session;
    if (system) {  // what was said follows it
      const {data} = await get(url`v1/sessions/${session.id}/messages`);
      const first = this.tree.path()[0];
      for (const message of data) this.tree.add(message);
      this.tree.children.set(null, this.tree.children.get(null).filter(id => id !== first.id));
      first.parent = session.head;
      this.tree.children.set(session.head, [first.id]);
      this.thread.show();
    }
    this.composer.move(session.id);
    this.changed(session, true);
  }

  async edit(message, text) {
    if (this.isBusy) { note('An answer is being written: stop it first.', true); return; }
    if (message.role === 'system') { this.newSystem(text); return; }
    const head = this.tree.head, content = contentOf(mediaOf(message), text);
    const {session} = message;  // from which its pictures are shown
    const asked = this.local({role: message.role, content, parent: message.parent, session});
    this.tree.head = asked.id;
    this.thread.show({keepsPlace: true});
    await this.begin(this.round, asked, async () =>
      ({type: 'edit', session: this.id, message: message.id, content: sendable(content)}), () => {
      this.tree.head = head;
    });
  }

  async regenerate(message) {
    if (this.isBusy) { note('An answer is being written: stop it first.', true); return; }
    const head = this.tree.head;
    this.tree.head = message.parent;
    this.thread.show({keepsPlace: true});
    await this.begin(this.round, null, async () =>
      ({type: 'regenerate', session: this.id, message: message.id}), () => {
      this.tree.head = head;
    });
  }

  // Begin a turn: `asked` is the question on the page, until the server has given it an id.
  async begin(round, asked, frame, undo) {
    this.isSending = true;
    this.composer.busy(true);
    try {
      const turn = await this.socket.begin({...await frame(), ...this.choice()});
      if (round !== this.round) return;
      this.begun(turn, asked);
    } catch (error) {
      if (round !== this.round) return;
      if (asked) { this.thread.views.delete(asked.id); this.tree.drop(asked.id); }
      undo();
      if (error.isLost) await this.open(this.id);  // it may have begun all the same
      else this.thread.show({keepsPlace: true});
      note(error.message, true);
    } finally {
      if (round === this.round) {
        this.isSending = false;
        this.composer.busy(this.isBusy);
      }
    }
  }

  choice() { return this.models.wanted ? {model: this.models.wanted} : {}; }

  begun(turn, asked) {
    if (asked && turn.parent) {
      this.thread.rename(asked.id, turn.parent);
      this.tree.rename(asked.id, turn.parent);
    }
    const message = this.tree.add({id: turn.message, role: 'assistant', content: '',
      parent: turn.parent, status: 'running', model: turn.model});
    this.tree.head = message.id;
    this.turns.set(turn.turn, message.id);
    this.thread.show({keepsPlace: !this.thread.isPinned});
    this.thread.view(message.id).begin();
    if (document.activeElement === document.body && matchMedia('(pointer: fine)').matches) {
      this.composer.area.focus({preventScroll: true});
    }
    this.changed(this.session, false);
    say('The model answers.');
    for (const event of this.early.get(turn.turn) || []) this.heard(event);
    this.early.delete(turn.turn);
  }

  heard(event) {
    const id = this.turns.get(event.turn);
    if (id === undefined) {
      if (this.isSending) {
        if (!this.early.has(event.turn)) this.early.set(event.turn, []);
        this.early.get(event.turn).push(event);
      }
      return;
    }
    const view = this.thread.view(id);
    if (event.type === 'turn') return;
    if (event.type !== 'end' && event.type !== 'error') { view?.heard(event); return; }
    this.turns.delete(event.turn);
    const isStopped = event.error?.code === 'cancelled' || event.message?.status === 'partial';
    if (view) view.end(event.message, event.error && !isStopped ? event.error : null);
    else if (event.message) Object.assign(this.tree.messages.get(id) || {}, event.message);
    this.showUse();
    this.composer.busy(this.isBusy);
    this.changed(this.session, false);
    const text = view?.text || '';
    say(event.error && !isStopped ? `No answer: ${event.error.message}`
      : `${isStopped ? 'Stopped.' : 'Answer:'} ${text.slice(0, SAID)}`);
  }

  stop() {
    for (const turn of this.turns.keys()) this.socket.cancel(turn);
  }

  // Turn to the branch before or after a message's.
  async turn(message, step) {
    const siblings = this.tree.siblings(message);
    const to = siblings[siblings.indexOf(message.id) + step];
    if (to === undefined) return;
    const head = this.tree.head = this.tree.newestLeaf(to);
    this.thread.show({keepsPlace: true});
    const label = step < 0 ? 'Previous branch' : 'Next branch';
    const buttons = this.thread.view(to)?.element.querySelectorAll('.branches button') || [];
    const same = [...buttons].find(b => b.getAttribute('aria-label') === label && !b.disabled);
    (same || [...buttons].find(b => !b.disabled))?.focus();
    this.showUse();
    const at = siblings.indexOf(to);
    say(`Branch ${at + 1} of ${siblings.length}`);
    try {
      if (head.startsWith('local-')) return;
      await this.change({head});
    } catch (error) { note(error.message, true); }
  }

  async change(fields) {
    const {session} = this;
    const changed = await patch(url`v1/sessions/${session.id}`, fields);
    Object.assign(session, ofSession(session.id, changed));
  }

  // The settings were changed.
  async configure({settings, system}) {
    if (!this.session) {
      this.draft = {settings, system};
      this.settings.set(settings, system);
      return;
    }
    try {
      await this.change({settings});
      if (system !== this.settings.system) await this.newSystem(system);
      else this.settings.set(settings, system);
    } catch (error) { note(error.message, true); }
  }

  // Another system prompt begins a branch of its own.
  async newSystem(text) {
    try {
      await post(url`v1/sessions/${this.id}/messages`, {
        message: {role: 'system', content: text}, parent: 'root', branch: true, reply: false});
      await this.open(this.id);
    } catch (error) { note(error.message, true); }
  }

  async chooseModel(model) {
    if (!this.session) return;
    try {
      await this.change({model});
    } catch (error) { note(error.message, true); }
  }

  // Edit what was said last; whether there is anything.
  editLast() {
    const last = this.tree.path().findLast(message => message.role === 'user');
    const view = last && !this.isBusy && this.thread.view(last.id);
    if (view) view.edit();
    return Boolean(view);
  }
}
