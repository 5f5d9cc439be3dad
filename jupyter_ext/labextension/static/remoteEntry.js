/* The federated module that JupyterLab and Notebook load, written by hand: nothing is built.

   It has the form of webpack's containers: `init` takes the modules that the application shares,
   `get` gives ours, made with them. The work is in the ES modules beside this file. */
(() => {
  "use strict";

  const here = new URL(document.currentScript.src);
  // The version in the query is that of all files here, see `_build.load` in package.json.
  const address = name => new URL(name + here.search, here).href;
  let scope = {};

  /* A shared module: the version in use, else the newest; undefined if there is none. */
  async function shared(name) {
    const versions = Object.entries(scope[name] ?? {});
    versions.sort(([a, x], [b, y]) =>
      Boolean(y.loaded) - Boolean(x.loaded) || b.localeCompare(a, "en", { numeric: true })
    );
    if (versions.length === 0) return undefined;
    const factory = await versions[0][1].get();
    return factory();
  }

  const needed = [
    "@jupyterlab/application",
    "@jupyterlab/apputils",
    "@jupyterlab/coreutils",
    "@jupyterlab/services",
    "@jupyterlab/ui-components",
    "@lumino/signaling",
    "@lumino/widgets"
  ];

  async function extension() {
    const modules = {};
    for (const name of needed) {
      const found = await shared(name);
      if (found === undefined) throw new Error(`llmkit: this application does not share ${name}`);
      Object.assign(modules, found);
    }
    // Not every application has a status bar.
    Object.assign(modules, await shared("@jupyterlab/statusbar"));
    const { plugins } = await import(address("plugin.js"));
    return { __esModule: true, default: plugins(modules) };
  }

  async function style() {
    const link = document.createElement("link");
    link.rel = "stylesheet";
    link.href = address("models.css");
    document.head.append(link);
    return { __esModule: true };
  }

  const exposed = { "./extension": extension, "./style": style };
  window._JUPYTERLAB = window._JUPYTERLAB ?? {};
  window._JUPYTERLAB["@llmkit/lab"] = {
    init(shareScope) {
      scope = shareScope;
    },
    async get(name) {
      if (!(name in exposed)) throw new Error(`llmkit: there is no module ${name}`);
      const made = await exposed[name]();
      return () => made;
    }
  };
})();
