/* The requests to the gateway in the Jupyter server, as this user. */

export function gateway({ ServerConnection, PageConfig, URLExt }) {
  const settings = ServerConnection.makeSettings();
  const root = URLExt.join(settings.baseUrl, "llmkit");

  async function request(path, init, query = "") {
    let response;
    try {
      response = await ServerConnection.makeRequest(
        URLExt.join(root, path) + query,
        init,
        settings
      );
    } catch (error) {
      if (init.signal?.aborted) throw error;
      throw new Error("The Jupyter server does not answer.", { cause: error });
    }
    if (response.ok) return response.json();
    const error = new Error(await reason(response));
    error.status = response.status;
    throw error;
  }

  return {
    baseUrl: new URL(URLExt.join(PageConfig.getBaseUrl(), "llmkit/v1"), location.href).href,
    chatUrl: model => {
      const query = model === undefined ? "" : URLExt.objectToQueryString({ model });
      return URLExt.join(PageConfig.getBaseUrl(), "llmkit/chat") + query;
    },
    // Looking is no activity: a server that nobody uses may still be culled.
    state: signal => 
      request("status", { signal, cache: "no-store" }, "?no_track_activity=1"),
    unload: (model, force) =>
      request("admin/models/unload", {
        method: "POST",
        body: JSON.stringify({ model, force, drain: false })
      })
  };
}

async function reason(response) {
  const said = await response.json().catch(() => ({}));
  const message = said.error?.message ?? said.message;
  if (response.status === 404 && said.error === undefined) {
    return (
      "llmkit is not enabled in this Jupyter server. " +
      "Run: jupyter server extension enable llmkit_jupyter"
    );
  }
  if (message) return message;
  return `The Jupyter server answers ${response.status} ${response.statusText}`.trim() + ".";
}
