/* Puts the parts together, and into the application. */

import { Feed } from "./feed.js";
import { makePanel } from "./panel.js";
import { gateway } from "./server.js";
import { makeStatusItem } from "./status.js";
import { count, isBusy, place, size } from "./words.js";

const ICON =
  '<svg xmlns="http://www.w3.org/2000/svg" width="16" height="16" viewBox="0 0 16 16">' +
  '<g class="jp-icon3" fill="#616161">' +
  '<path d="M4 4h8v8H4zm1.4 1.4v5.2h5.2V5.4z" fill-rule="evenodd"/>' +
  '<path d="M5 1.5h1.2V4H5zm4.8 0H11V4H9.8zM5 12h1.2v2.5H5zm4.8 0H11v2.5H9.8z"/>' +
  '<path d="M1.5 5H4v1.2H1.5zm0 4.8H4V11H1.5zM12 5h2.5v1.2H12zm0 4.8h2.5V11H12z"/>' +
  "</g></svg>";

const SHOW = "llmkit:show-models";
const CHAT = "llmkit:open-chat";
const COPY = "llmkit:copy-base-url";

/* `jupyter` has what the application's modules export. */
export function plugins(jupyter) {
  const { ICommandPalette, ILayoutRestorer, IStatusBar } = jupyter;
  const optional = [ILayoutRestorer, ICommandPalette, IStatusBar];
  return [
    {
      id: "@llmkit/lab:models",
      description: "Shows the models that notebooks hold, in a sidebar and the status bar.",
      autoStart: true,
      optional: optional.filter(Boolean),
      activate: (app, ...given) => {
        let next = 0;
        const services = optional.map(token => (token ? given[next++] : null));
        activate(jupyter, app, ...services);
      }
    }
  ];
}

function activate(jupyter, app, restorer, palette, statusBar) {
  const { Clipboard, LabIcon } = jupyter;
  const icon = new LabIcon({ name: "llmkit:models", svgstr: ICON });
  const server = gateway(jupyter);
  const feed = new Feed(signal => server.state(signal));

  const actions = {
    openChat: model => window.open(server.chatUrl(model?.exact), "_blank", "noopener"),
    openNotebook: model => app.commands.execute("docmanager:open", { path: model.place }),
    unload: model => unload(jupyter, server, feed, panel, model),
    async copyBaseUrl() {
      try {
        await navigator.clipboard.writeText(server.baseUrl);
      } catch {
        Clipboard.copyToSystem(server.baseUrl); // without https browsers have no other way
      }
      panel.say(`Copied ${server.baseUrl}`);
    }
  };
  const panel = makePanel(jupyter, feed, actions, server.baseUrl);
  panel.title.icon = icon;
  panel.title.caption = "Models";
  app.shell.add(panel, "left", { rank: 250, type: "Models" });
  restorer?.add(panel, panel.id);

  const show = () => app.shell.activateById(panel.id);
  const commands = [
    [SHOW, "Show Models", show],
    [CHAT, "Open Chat with a Model", () => actions.openChat()],
    [COPY, "Copy Base URL of the Models", () => actions.copyBaseUrl()]
  ];
  for (const [id, label, execute] of commands) {
    app.commands.addCommand(id, { label, execute });
    palette?.addItem({ command: id, category: "llmkit" });
  }
  if (statusBar) {
    feed.hasStatusItem = true;
    statusBar.registerStatusItem(
      "@llmkit/lab:models",
      makeStatusItem(jupyter, feed, icon, show)
    );
  }
  void app.restored.then(() => feed.look());
}

/* Ask first; ask again if it has begun to answer somebody meanwhile. */
async function unload(jupyter, server, feed, panel, model) {
  const { Dialog, showDialog } = jupyter;
  for (let busy = isBusy(model); ; busy = true) {
    const answer = await showDialog({
      title: `Unload ${model.id}?`,
      body: warning(model, busy),
      buttons: [Dialog.cancelButton(), Dialog.warnButton({ label: "Unload" })],
      defaultButton: 0
    });
    if (!answer.button.accept) return;
    panel.say(`Unloading ${model.id} …`);
    panel.setUnloading(model, true);
    try {
      await server.unload(model.exact, busy);
      panel.say(`Unloaded ${model.id}; its memory is free.`);
      panel.focusHeading();
      return;
    } catch (error) {
      if (error.status === 409 && !busy) continue;
      panel.say(`${model.id} is not unloaded: ${error.message}`, true);
      return;
    } finally {
      panel.setUnloading(model, false);
      feed.look();
    }
  }
}

function warning(model, busy) {
  const bytes = model.weights_bytes + (model.kv_bytes ?? 0);
  const running = model.num_running + model.num_waiting;
  const requests = running > 0 ? count(running, "request") : "Requests";
  return (
    `It is held by ${place(model)}. This frees about ${size(bytes)}; ` +
    "llmkit.load() in the notebook loads it again." +
    (busy ? ` ${requests} that it is answering will end with an error.` : "")
  );
}
