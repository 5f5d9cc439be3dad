// A conversation as a tree of messages, of which one path is shown. Knows no page.

export class Tree {
  constructor() { this.replace([], null); }

  // The latest messages, newest first. Those before them may come later.
  replace(messages, head) {
    this.messages = new Map();
    this.children = new Map([[null, []]]);
    this.addEarlier(messages);
    this.head = this.messages.has(head) ? head : messages[0]?.id ?? null;
  }

  // Messages that were stored before all that are here, newest first. Gives the ids of those that
  // have other siblings now.
  addEarlier(messages) {
    const changed = new Set();
    for (const message of messages) {
      if (this.messages.has(message.id)) continue;
      message.parent = message.parent ?? null;
      this.messages.set(message.id, message);
      const siblings = this.children.get(message.parent) || [];
      siblings.unshift(message.id);
      this.children.set(message.parent, siblings);
      if (siblings.length > 1) siblings.forEach(id => changed.add(id));
    }
    return changed;
  }

  add(message) {
    const known = this.messages.get(message.id);
    if (known) return Object.assign(known, message);
    message.parent = message.parent ?? null;
    this.messages.set(message.id, message);
    if (!this.children.has(message.parent)) this.children.set(message.parent, []);
    this.children.get(message.parent).push(message.id);
    return message;
  }

  // What was stored before the first message that is here, and up to `head`.
  precede(messages, head) {
    if (!messages.length) return;
    const [first] = this.path();
    for (const message of messages) this.add(message);
    this.children.set(null, this.children.get(null).filter(id => id !== first.id));
    this.children.set(head, [first.id]);
    first.parent = head;
  }

  // A message has got another id: the server's.
  rename(from, to) {
    const message = this.messages.get(from);
    if (!message || from === to) return;
    this.messages.delete(from);
    this.messages.set(to, message);
    message.id = to;
    const siblings = this.children.get(message.parent);
    siblings[siblings.indexOf(from)] = to;
    for (const child of this.children.get(from) || []) this.messages.get(child).parent = to;
    if (this.children.has(from)) this.children.set(to, this.children.get(from));
    this.children.delete(from);
    if (this.head === from) this.head = to;
  }

  drop(id) {
    const message = this.messages.get(id);
    if (!message) return;
    this.messages.delete(id);
    const siblings = this.children.get(message.parent);
    siblings.splice(siblings.indexOf(id), 1);
    if (this.head === id) this.head = message.parent;
  }

  siblings(message) { return this.children.get(message.parent) || []; }

  // The end of the branch that was written last below a message.
  newestLeaf(id) {
    for (;;) {
      const below = this.children.get(id);
      if (!below || !below.length) return id;
      id = below[below.length - 1];
    }
  }

  // The messages shown, the first first; as far as they are here.
  path() {
    const found = [];
    for (let id = this.head; id !== null && this.messages.has(id);) {
      const message = this.messages.get(id);
      found.push(message);
      id = message.parent;
    }
    return found.reverse();
  }

  // Whether all of what is shown is here.
  get isWhole() {
    const [first] = this.path();
    return !first || first.parent === null;
  }

  // Of what is shown; `first` is the first message of all, which may not be here yet.
  systemPrompt(first) {
    const known = this.isWhole ? this.path() : [first];
    return known.find(message => message?.role === 'system')?.content || '';
  }
}

// What a message says, whatever the form of its content.
export function textOf(message) {
  const content = message.content;
  if (!Array.isArray(content)) return content ?? '';
  return content.map(part => part.text ?? '').join('');
}
