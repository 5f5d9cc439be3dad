/* The item in the status bar: what the models are doing, in a few words. Opens the panel. */

import { summary } from "./words.js";

export function makeStatusItem({ Signal, Widget }, feed, icon, open) {
  const item = new Widget();
  const node = document.createElement("button");
  node.type = "button";
  node.className = "llmkit-Status";
  node.addEventListener("click", open);
  const text = document.createElement("span");
  node.append(icon.element({ tag: "span", width: "14px", height: "14px" }), text);
  item.node.append(node);
  item.addClass("jp-mod-highlighted");
  const changed = new Signal(item);
  let isActive = false;
  feed.onChange(() => {
    const said = feed.error ? "Models: no answer" : summary(feed.models);
    if (text.textContent !== said) text.textContent = said;
    node.title = feed.error || "Models that notebooks hold; click for more";
    const wasActive = isActive;
    isActive = feed.models.length > 0;
    if (isActive !== wasActive) changed.emit();
  });
  return { item, align: "left", rank: 5, isActive: () => isActive, activeStateChanged: changed };
}
