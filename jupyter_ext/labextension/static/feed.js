/* What the server says of its models, asked again while somebody looks. Knows no widgets. */

export const EAGER_MS = 2000;
const IDLE_MS = 10000; // nothing is loaded, and only the status bar would show it
const TIMEOUT_MS = 15000;

export class Feed {
  /* `fetchState(signal)` gives the JSON of llmkit/status, or throws an Error to show. */
  constructor(fetchState) {
    this._fetch = fetchState;
    this._listeners = [];
    this._before = new Map(); // counters of the last answer, by model
    this._timer = 0;
    this._asking = false;
    this.models = [];
    this.error = "";
    this.isKnown = false; // whether there was an answer yet
    this.panelIsVisible = false;
    this.hasStatusItem = false;
    document.addEventListener("visibilitychange", () => this.look());
  }

  onChange(listener) {
    this._listeners.push(listener);
  }

  /* Ask now, if anybody sees the answer, and again later. */
  look() {
    clearTimeout(this._timer);
    if (this._wait() !== null && !this._asking) void this._ask();
  }

  _wait() {
    if (document.hidden) return null;
    if (this.panelIsVisible) return EAGER_MS;
    if (!this.hasStatusItem) return null;
    return this.models.length > 0 ? EAGER_MS : IDLE_MS;
  }

  async _ask() {
    this._asking = true;
    const patience = new AbortController();
    const bell = setTimeout(() => patience.abort(), TIMEOUT_MS);
    try {
      const state = await this._fetch(patience.signal);
      this.models = state.models.map(model => this._rated(model));
      this._before = new Map(this.models.map(model => [model.key, model]));
      this.error = "";
      this.isKnown = true;
    } catch (error) {
      this.error = patience.signal.aborted
        ? "The Jupyter server takes long to answer."
        : String(error.message ?? error);
    } finally {
      clearTimeout(bell);
      this._asking = false;
    }
    for (const listener of this._listeners) listener();
    clearTimeout(this._timer);
    const wait = this._wait();
    if (wait !== null) this._timer = setTimeout(() => this.look(), wait);
  }

  /* The model with its exact name and its speed (tokens/s) since the last answer. */
  _rated(model) {
    const place = String(model.kernel ?? model.pid ?? "");
    const exact = model.id.includes(`@${place}`) ? model.id : `${model.id}@${place}`;
    const key = `${exact} ${model.pid}`;
    const at = performance.now();
    const before = this._before.get(key);
    const made = before ? model.generation_tokens_total - before.generation_tokens_total : 0;
    const speed = before && made > 0 ? (1000 * made) / (at - before.at) : 0;
    return { ...model, exact, key, at, speed };
  }
}
