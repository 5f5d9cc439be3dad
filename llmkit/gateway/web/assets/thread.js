// The messages of a conversation on the page. The last ones come first; the others follow while the
// browser has nothing else to do, above what is being read.

import {$, el} from './dom.js';
import {MessageView, onFrame} from './message.js';

const FIRST = 30, CHUNK = 60, NEAR = 80;
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
    this.shown = [];  // the ids of the path
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
  }

  keepPinned() { if (this.isPinned) this.box.scrollTop = this.box.scrollHeight; }

  toEnd() {
    this.isPinned = true;
    this.keepPinned();
  }

  view(id) { return this.views.get(id); }

  // Show the path of the tree; what is on the page already, and still on it, is not touched.
  show({keepsPlace = false} = {}) {
    const path = this.tree.path().filter(message => message.role !== 'system' || message.content);
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
    } else this.showLast(path);
    if (!keepsPlace) this.toEnd();
  }

  // All of it anew, from its end.
  showLast(path) {
    const round = ++this.round;
    this.from = Math.max(0, path.length - FIRST);
    const place = this.box.scrollTop;
    this.list.replaceChildren(...path.slice(this.from).map(m => this.made(m).element));
    this.box.scrollTop = place;
    const more = () => {
      if (round !== this.round || this.from <= 0) return;
      const to = this.from;
      this.from = Math.max(0, to - CHUNK);
      const {scrollHeight, scrollTop} = this.box;
      this.list.prepend(...path.slice(this.from, to).map(message => this.made(message).element));
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
    this.shown = [];
    this.from = 0;
    this.list.replaceChildren();
  }

  // Nothing but a word about what is the matter.
  tell(text) { this.list.replaceChildren(el('p', {class: 'hint'}, text)); }
}
