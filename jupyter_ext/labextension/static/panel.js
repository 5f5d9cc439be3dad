/* The sidebar: a card for each loaded model, changed in place so that focus and selection stay. */

import { count, isBusy, memory, place, speed } from "./words.js";

/* `actions`: openChat(model), copyBaseUrl(), openNotebook(model), unload(model). */
export function makePanel({ Widget }, feed, actions, baseUrl) {
  class ModelsPanel extends Widget {
    constructor() {
      super();
      this.id = "llmkit-models";
      this.addClass("llmkit-Models");
      this.node.setAttribute("role", "region");
      this.node.setAttribute("aria-label", "Models");
      this._cards = new Map();
      this._build();
      feed.onChange(() => this._update());
      this._update();
    }

    onAfterShow() {
      feed.panelIsVisible = true;
      feed.look();
    }

    onAfterAttach() {
      if (this.isVisible) this.onAfterShow();
    }

    onBeforeHide() {
      feed.panelIsVisible = false;
    }

    onBeforeDetach() {
      feed.panelIsVisible = false;
    }

    onActivateRequest() {
      this._heading.focus();
    }

    /* Tell the user, and screen readers, what happened. */
    say(text, isError = false) {
      put(this._said, text);
      this._said.classList.toggle("llmkit-mod-error", isError);
    }

    /* The model of this card is being unloaded, or no longer. */
    setUnloading(model, isUnloading) {
      const card = this._cards.get(model.key);
      if (card === undefined) return;
      card.unload.disabled = isUnloading;
      put(card.unload, isUnloading ? "Unloading…" : "Unload");
    }

    focusHeading() {
      this._heading.focus();
    }

    _build() {
      this._heading = element("h2", "llmkit-Models-heading", "Models");
      this._heading.tabIndex = -1;
      const chat = button("Open chat", () => actions.openChat());
      const copy = button("Copy base URL", () => actions.copyBaseUrl());
      const url = element("code", "llmkit-Models-url", baseUrl);
      url.title = "Where other programs reach these models";
      this._error = element("p", "llmkit-Models-error");
      this._error.setAttribute("role", "alert");
      this._empty = element("p", "llmkit-Models-empty");
      this._list = element("ul", "llmkit-Models-list");
      this._list.setAttribute("aria-label", "Loaded models");
      this._said = element("p", "llmkit-Models-said");
      this._said.setAttribute("role", "status");
      const head = element("div", "llmkit-Models-head");
      head.append(this._heading, row(chat, copy), url, this._said, this._error);
      this.node.append(head, this._empty, this._list);
    }

    _update() {
      put(this._error, feed.error);
      this._list.classList.toggle("llmkit-mod-old", feed.error !== "");
      if (!feed.isKnown) {
        put(this._empty, feed.error ? "" : "Asking the server …");
      } else if (feed.models.length > 0) {
        put(this._empty, "");
      } else if (this._empty.querySelector("code") === null) {
        const code = element("code", "", 'llmkit.load("smollm2")');
        this._empty.replaceChildren("No model is loaded. In a notebook: ", code);
      }
      const here = new Set(feed.models.map(model => model.key));
      for (const [key, card] of this._cards) {
        if (here.has(key)) continue;
        const hadFocus = card.node.contains(document.activeElement);
        card.node.remove();
        this._cards.delete(key);
        if (hadFocus) this._heading.focus();
      }
      feed.models.forEach((model, index) => {
        let card = this._cards.get(model.key);
        if (card === undefined) {
          card = makeCard(actions);
          this._cards.set(model.key, card);
        }
        card.show(model);
        const there = this._list.children[index];
        if (there !== card.node) this._list.insertBefore(card.node, there ?? null);
      });
    }
  }
  return new ModelsPanel();
}

function makeCard(actions) {
  let model;
  const node = element("li", "llmkit-Model");
  const name = element("h3", "llmkit-Model-name");
  const kind = element("span", "llmkit-Model-kind");
  const notebook = button("", () => actions.openNotebook(model));
  notebook.className = "llmkit-Model-place";
  const elsewhere = element("p", "llmkit-Model-place");
  const facts = element("dl", "llmkit-Model-facts");
  const bar = element("div", "llmkit-Model-bar");
  const filled = element("div");
  bar.append(filled);
  bar.setAttribute("aria-hidden", "true");
  const chat = button("Open chat", () => actions.openChat(model));
  const unload = button("Unload", () => actions.unload(model));
  unload.classList.add("llmkit-mod-warn");
  node.append(name, kind, notebook, elsewhere, facts, bar, row(chat, unload));
  return {
    node,
    unload,
    show(now) {
      model = now;
      put(name, model.id);
      put(kind, [model.quantization, model.device.toUpperCase()].filter(Boolean).join(", "));
      put(notebook, model.place);
      notebook.title = `Open ${model.place}`;
      notebook.hidden = !model.place;
      put(elsewhere, model.place ? "" : place(model));
      elsewhere.hidden = Boolean(model.place);
      chat.hidden = !model.generates;
      chat.setAttribute("aria-label", `Open chat with ${model.id}`);
      unload.setAttribute("aria-label", `Unload ${model.id}`);
      node.classList.toggle("llmkit-mod-busy", isBusy(model));
      bar.hidden = !model.kv_bytes;
      filled.style.width = `${100 * model.kv_usage}%`;
      list(facts, [
        ["Speed", model.speed > 0 ? speed(model.speed) : isBusy(model) ? "busy" : "idle"],
        ["Requests", `${model.num_running} running, ${model.num_waiting} waiting`],
        ["Context", count(model.n_ctx, "token")],
        ...memory(model)
      ]);
    }
  };
}

/* The pairs as a description list; only what differs is changed. */
function list(node, pairs) {
  while (node.children.length > 2 * pairs.length) node.lastChild.remove();
  while (node.children.length < 2 * pairs.length) node.append(element("dt"), element("dd"));
  pairs.forEach(([name, text], index) => {
    put(node.children[2 * index], name);
    put(node.children[2 * index + 1], text);
  });
}

function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function element(kind, className = "", text = "") {
  const node = document.createElement(kind);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

function button(label, run) {
  const node = element("button", "llmkit-Button", label);
  node.type = "button";
  node.addEventListener("click", run);
  return node;
}

function row(...nodes) {
  const node = element("div", "llmkit-Row");
  node.append(...nodes);
  return node;
}
