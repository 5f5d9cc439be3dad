// The messages of a conversation on the page. The last ones come first; the others follow as they
// are loaded, while the browser has nothing else to do, above what is being read.

import {$, el} from './dom.js';
import {MessageView, onFrame} from './message.js';

const FIRST = 30, CHUNK = 60, NEAR = 80, FAR = 3000;
const idle = window.requestIdleCallback || (action => setTimeout(action, 30));

export class Thread {
  constructor(tree, actions) {
    this.tree = tree;
    this.actions = {...actions, siblings: message => tree.siblings(message)};
    this.views = new Map();
    this.box = $('thread');
    this.list = $('messages');
    this.isPinned = true;
    this.lastTop = 0;
    this.round = 0;
    this.path = [];  // the messages
    this.shown = [];  // their ids
    this.from = 0;  // how many of them, from the first, are not on the page yet
    this.box.addEventListener('scroll', () => this.scrolled(), {passive: true});
    onFrame(() => this.keepPinned());
    $('latest').addEventListener('click', () => this.toEnd());
    const sizes = new ResizeObserver(() => this.keepPinned());
    sizes.observe(this.box);
    sizes.observe(this.list);
  }

  scrolled() {
    const {scrollHeight, scrollTop, clientHeight} = this.box;
    // Only who scrolls up lets go of the end; what grows does not.
    const isUp = scrollTop < this.lastTop - 2;
    this.isPinned = scrollHeight - scrollTop - clientHeight < NEAR || (this.isPinned && !isUp);
    this.lastTop = scrollTop;
    $('latest').hidden = this.isPinned;
    if (this.isAtTop) this.actions.reachTop();
  }

  // Whether earlier messages will be seen soon.
  get isAtTop() { return this.from === 0 && this.box.scrollTop < FAR; }

  keepPinned() { if (this.isPinned) this.box.scrollTop = this.box.scrollHeight; }

  toEnd() {
    this.isPinned = true;
    this.keepPinned();
  }

  view(id) { return this.views.get(id); }

  // Show the path of the tree; what is on the page already, and still on it, is not touched.
  show({keepsPlace = false} = {}) {
    const path = this.path = this.visible();
    const ids = path.map(message => message.id);
    let same = 0;
    while (same < ids.length && ids[same] === this.shown[same]) same++;
    const wanted = new Set(ids);
    for (const [id, view] of this.views) {
      if (wanted.has(id)) continue;
      view.element.remove();
      if (!view.isStreaming) this.views.delete(id);
    }
    $('welcome').hidden = path.some(message => message.role !== 'system');
    this.shown = ids;
    if (same > this.from) {
      while (this.list.children.length > same - this.from) this.list.lastElementChild.remove();
      this.list.append(...path.slice(same).map(message => this.made(message).element));
      this.views.get(ids[same - 1])?.showFoot();
    } else this.showLast();
    if (!keepsPlace) this.toEnd();
  }

  visible() {
    return this.tree.path().filter(message => message.role !== 'system' || message.content);
  }

  // Earlier messages have been added to the tree, which gave some others siblings.
  showEarlier(changed) {
    for (const id of changed) {
      const view = this.views.get(id);
      if (view && !view.isStreaming) view.showFoot();
    }
    const path = this.visible(), count = path.length - this.path.length;
    if (count <= 0) return;
    this.path = path;
    this.shown = path.map(message => message.id);
    this.from += count;
    this.fill();
  }

  // All of it anew, from its end.
  showLast() {
    this.from = Math.max(0, this.path.length - FIRST);
    const place = this.box.scrollTop;
    this.list.replaceChildren(...this.path.slice(this.from).map(m => this.made(m).element));
    this.box.scrollTop = place;
    this.fill();
  }

  // Put what is before it above it, bit by bit.
  fill() {
    const round = ++this.round;
    const more = () => {
      if (round !== this.round || this.from <= 0) return;
      const to = this.from;
      this.from = Math.max(0, to - CHUNK);
      const {scrollHeight, scrollTop} = this.box;
      this.list.prepend(...this.path.slice(this.from, to).map(m => this.made(m).element));
      if (this.isPinned) this.keepPinned();
      else if (this.box.scrollTop === scrollTop) {
        this.box.scrollTop = scrollTop + this.box.scrollHeight - scrollHeight;
      }
      idle(more);
    };
    idle(more);
  }

  made(message) {
    let view = this.views.get(message.id);
    if (!view) {
      view = new MessageView(message, this.actions);
      this.views.set(message.id, view);
    } else if (!view.isStreaming) view.showFoot();
    return view;
  }

  rename(from, to) {
    const view = this.views.get(from);
    if (!view || from === to) return;
    this.views.delete(from);
    this.views.set(to, view);
    view.element.dataset.id = to;
    this.shown = this.shown.map(id => (id === from ? to : id));
  }

  clear() {
    this.round++;
    this.views.clear();
    this.path = [];
    this.shown = [];
    this.from = 0;
    this.list.replaceChildren();
  }

  // Nothing but a word about what is the matter.
  tell(text) { this.list.replaceChildren(el('p', {class: 'hint'}, text)); }
}
