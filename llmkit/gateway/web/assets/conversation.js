// The conversation that is shown: loads it, sends, edits, regenerates, and turns to other branches.

import {$, note, say} from './dom.js';
import {contentOf, forget, mediaOf, sendable} from './pictures.js';
import {beginSession, changeSession, loadSession, pageBefore, setSystem} from './session.js';
import {Thread} from './thread.js';
import {Tree} from './tree.js';

const TITLE = 60, SAID = 600;
const EAGER = 5000;  // messages that are loaded without being scrolled to

export class Conversation {
  // `changed(session, isNew)` hears of what happens to conversations, `gone()` that the one to be
  // shown is not here any more.
  constructor(socket, models, {changed, gone}) {
    this.socket = socket;
    this.models = models;
    this.changed = changed;
    this.gone = gone;
    this.tree = new Tree();
    this.thread = new Thread(this.tree, {
      edit: (message, text) => this.edit(message, text),
      regenerate: message => this.regenerate(message),
      turn: (message, step) => this.turn(message, step),
      reachTop: () => this.loadEarlier(),
    });
    this.session = this.opening = null;
    this.missing = null;  // the id of one that could not be loaded
    this.draft = {settings: {}, system: ''};  // of a conversation that has not begun
    this.turns = new Map();  // turn → the id of its reply
    this.early = new Map();  // events of turns whose reply is not on the page yet
    this.round = 0;  // counts what was loaded
    this.visit = 0;  // counts the conversations that were shown
    this.pending = Promise.resolve();  // until it is loaded, begun and changed as was asked
    this.waiting = null;  // what is sent once that is done
    this.rest = null;  // where the earlier messages begin that are not loaded yet
    this.numLocal = 0;
  }

  get id() { return this.session?.id ?? null; }
  // What is shown, or will be once it is loaded; undefined while it begins or cannot be loaded.
  get wanted() {
    return this.isBeginning || this.missing !== null ? undefined : this.opening ?? this.id;
  }
  get isBusy() { return this.turns.size > 0 || Boolean(this.isSending || this.waiting); }

  bind({settings, composer}) {
    this.settings = settings;
    this.composer = composer;
  }

  // Show another conversation, or a new one for null.
  open(id) {
    this.visit++;
    this.waiting = null;
    this.settings.close();
    return this.pending = this.load(id);
  }

  async load(id, {joins = true} = {}) {
    const round = ++this.round;
    this.isSending = this.isBeginning = false;
    this.turns.clear();
    this.thread.clear();
    forget();
    this.session = this.missing = null;
    this.opening = id;
    this.rest = null;
    this.tree.replace([], null);
    this.composer.restore(id);
    this.composer.busy(this.isBusy);
    if (id === null) {
      $('thread').removeAttribute('aria-busy');
      this.show();
      return;
    }
    $('welcome').hidden = true;
    $('thread').setAttribute('aria-busy', 'true');
    let failure = null;
    const loaded = await loadSession(id, () => round === this.round)
      .catch(error => { failure = error; });
    if (round !== this.round) return;
    this.opening = null;
    $('thread').removeAttribute('aria-busy');
    if (failure?.status === 404) { await this.gone(); return; }
    if (failure) {
      this.missing = id;
      this.trouble = failure.message;
      if (failure.status !== 401) this.thread.tell(failure.message);
      return;
    }
    ({session: this.session, first: this.first, rest: this.rest} = loaded);
    this.tree.replace(loaded.messages, loaded.session.head);
    this.show();
    if (joins) for (const turn of loaded.running) this.join(turn);
    this.loadEarlier();
  }

  // Do something to the conversation that is shown: after what was asked before, and once it is
  // loaded; one that could not be is loaded again. Nothing is done if it was left by then.
  alter(action, undo = () => {}) {
    const {visit} = this;
    return this.pending = this.pending.then(async () => {
      if (visit === this.visit && this.missing !== null) {
        await this.load(this.missing);
        if (this.missing !== null) note(this.trouble, true);
      }
      if (visit !== this.visit || this.missing !== null) return;
      try { await action(); } catch (error) {
        note(error.message, true);
        if (visit === this.visit) undo();
      }
    });
  }

  reload(options) { return this.alter(() => this.load(this.id, options)); }

  // Whether it is there and as was asked, once that is known.
  async settled() {
    let isThere = false;
    await this.alter(() => { isThere = true; });
    return isThere;
  }

  // Load what was said before, page by page: a long conversation only as far as it is read.
  async loadEarlier() {
    if (this.isLoading) return;
    const round = this.round;
    const isWanted = () => round === this.round && this.rest !== null
      && (this.tree.messages.size < EAGER || (this.thread.isAtTop && !this.tree.isWhole));
    this.isLoading = true;
    try {
      while (isWanted()) {
        const page = await pageBefore(this.id, this.rest, isWanted);
        if (round !== this.round) break;
        this.rest = page.has_more ? page.last_id : null;
        this.thread.showEarlier(this.tree.addEarlier(page.data));
      }
    } catch (error) {
      if (round === this.round) note(`Earlier messages are missing: ${error.message}`, true);
    }
    this.isLoading = false;
    if (round !== this.round && this.rest !== null) this.loadEarlier();
  }

  show(options) {
    this.thread.show(options);
    this.models.set(this.session?.model || this.models.chosen);
    this.settings.set(this.session ? this.session.settings : this.draft.settings,
      this.session ? this.tree.systemPrompt(this.first) : this.draft.system);
    this.name();
    this.showUse();
    this.composer.busy(this.isBusy);
  }

  name() { document.title = `${this.session?.title || 'Chat'} · llmkit`; }

  showUse() {
    const last = this.tree.path().findLast(message => message.usage);
    this.models.context(last?.usage, last?.model);
  }

  // Whether another turn may begin.
  async isFree() {
    if (!(await this.settled())) return false;
    const isFree = !this.turns.size && !this.isSending;
    if (!isFree) note('An answer is being written: stop it first.', true);
    return isFree;
  }

  // A turn that runs already.
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
    const waiting = this.waiting = {};
    this.composer.busy(true);
    const isFree = await this.isFree();
    if (this.waiting !== waiting) return;  // stopped, or left: it is still in the box
    this.waiting = null;
    this.composer.busy(this.isBusy);
    if (!isFree) return;
    const head = this.tree.head, content = contentOf(pictures, text);
    const asked = this.local({role: 'user', content, parent: head});
    let session = this.id;
    this.tree.head = asked.id;
    this.thread.show();
    this.composer.sent();
    await this.begin(asked, async () => {
      session ??= await this.beginSession(text || 'Picture');
      const parent = head === null ? {} : {parent: head};
      return {type: 'send', session, content: sendable(content), ...parent};
    }, () => this.composer.giveBack(text, pictures, session));
  }

  // Gives its id. What is asked meanwhile waits for it. It begins also if it is left by then.
  beginSession(text) {
    const begun = this.makeSession(text.split('\n')[0].slice(0, TITLE));
    this.isBeginning = true;
    this.pending = begun.catch(() => {});
    return begun;
  }

  async makeSession(title) {
    const {visit} = this;
    const {session, messages} = await beginSession({title, model: this.models.chosen,
      ...this.draft});
    const isShown = visit === this.visit;
    if (isShown) {
      this.isBeginning = false;
      this.session = session;
      this.tree.precede(messages, session.head);
      this.thread.show();
      this.composer.move(session.id);
    }
    this.changed(session, isShown);
    return session.id;
  }

  async edit(message, text) {
    const giveBack = () => this.thread.view(message.id)?.edit(text);
    if (message.role === 'system') {
      await this.alter(() => this.newSystem(text), giveBack);
      return;
    }
    if (!(await this.isFree())) { giveBack(); return; }
    const head = this.tree.head, content = contentOf(mediaOf(message), text);
    const {session} = message;  // from which its pictures are shown
    const asked = this.local({role: message.role, content, parent: message.parent, session});
    const frame = {type: 'edit', session: this.id, message: message.id, content: sendable(content)};
    this.tree.head = asked.id;
    this.thread.show({keepsPlace: true});
    await this.begin(asked, async () => frame, giveBack, head);
  }

  async regenerate(message) {
    if (!(await this.isFree())) return;
    const head = this.tree.head;
    const frame = {type: 'regenerate', session: this.id, message: message.id};
    this.tree.head = message.parent;
    this.thread.show({keepsPlace: true});
    await this.begin(null, async () => frame, () => {}, head);
  }

  // Begin a turn: `asked` is the question on the page, until the server has given it an id. If it
  // cannot begin, `head` is shown again, if it is given, and `giveBack()` saves what was written.
  async begin(asked, frame, giveBack, head) {
    const {round, visit} = this, choice = this.choice();
    this.isSending = true;
    this.wantsStop = false;
    this.composer.busy(true);
    try {
      const turn = await this.socket.begin({...await frame(), ...choice});
      this.composer.arrived(turn.session);
      if (round === this.round) this.begun(turn, asked);
      // It was loaded anew meanwhile, and may know nothing of this.
      else if (visit === this.visit && !this.turns.has(turn.turn)) await this.reload();
    } catch (error) {
      const isElsewhere = error.code === 'conflict';
      note(isElsewhere ? 'This conversation went on elsewhere: see what was said, then send again.'
        : error.message, true);
      if (round !== this.round) { giveBack(); return; }
      this.isBeginning = false;
      if (asked) { this.thread.views.delete(asked.id); this.tree.drop(asked.id); }
      if (head !== undefined) this.tree.head = head;
      if (this.id && (error.isLost || isElsewhere)) await this.reload();  // it may have begun
      else this.thread.show({keepsPlace: true});
      giveBack();
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
    if (this.wantsStop) this.socket.cancel(turn.turn);
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
    if (event.type === 'lost') { this.reload({joins: false}); return; }
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
    this.waiting = null;
    this.wantsStop = this.isSending;
    this.socket.withdraw();
    for (const turn of this.turns.keys()) this.socket.cancel(turn);
    this.composer.busy(this.isBusy);
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
    if (!head.startsWith('local-')) await this.change({head});
  }

  // Change the session, if it has begun.
  change(fields) {
    return this.alter(async () => {
      if (this.session) await changeSession(this.session, fields);
    });
  }

  // The settings were changed.
  configure(values) {
    return this.alter(async () => {
      const {session, visit} = this, {settings, system} = values;
      if (session) await changeSession(session, {settings});
      else this.draft = values;
      if (visit !== this.visit) return;
      if (session && system !== this.settings.system) await this.newSystem(system);
      else this.settings.set(settings, system);
    }, () => this.settings.reopen(values));
  }

  // Another system prompt begins a branch of its own.
  async newSystem(text, {id, visit} = this) {
    await setSystem(id, text);
    if (visit === this.visit) await this.load(id);
  }

  chooseModel(model) {
    return this.alter(async () => {
      this.models.set(model);
      if (this.session) await changeSession(this.session, {model});
    });
  }

  // Edit what was said last; whether there is anything.
  editLast() {
    const last = this.tree.path().findLast(message => message.role === 'user');
    const view = last && !this.isBusy && this.thread.view(last.id);
    view?.edit();
    return Boolean(view);
  }
}
