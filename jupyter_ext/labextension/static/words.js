/* Numbers and states in words. Pure. */

export function size(bytes) {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${Math.round(bytes / 1e6)} MB`;
}

export function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

export function speed(tokensPerSecond) {
  const digits = tokensPerSecond >= 10 ? 0 : 1;
  return `${tokensPerSecond.toFixed(digits)} tokens/s`;
}

export function isBusy(model) {
  return model.num_running + model.num_waiting > 0;
}

/* Where a model is: its notebook, else its kernel or process. */
export function place(model) {
  if (model.place) return model.place;
  if (model.kernel) return `kernel ${model.kernel.slice(0, 8)}, no notebook`;
  return `process ${model.pid}`;
}

/* What it takes, as [name, text] pairs. */
export function memory(model) {
  const used = `${Math.round(100 * model.kv_usage)} % in use`;
  return [
    ...Object.entries(model.gpus ?? {}).map(([gpu, bytes]) => ["VRAM", `${size(bytes)}, ${gpu}`]),
    ...(model.rss_bytes ? [["RAM", `${size(model.rss_bytes)}, whole process`]] : []),
    ["Weights", size(model.weights_bytes)],
    ...(model.kv_bytes ? [["KV cache", `${size(model.kv_bytes)}, ${used}`]] : [])
  ];
}

/* One line for the status bar. */
export function summary(models) {
  const total = name => models.reduce((sum, model) => sum + model[name], 0);
  const parts = [models.length === 1 ? models[0].id : count(models.length, "model")];
  parts.push(total("speed") > 0 ? speed(total("speed")) : models.some(isBusy) ? "busy" : "idle");
  if (total("num_waiting") > 0) parts.push(`${total("num_waiting")} waiting`);
  return parts.join(" · ");
}
