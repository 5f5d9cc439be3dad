"""What `llmkit models` asks of a running gateway."""

from __future__ import annotations

from typing import Any

from llmkit.cli.endpoint import Endpoint, EndpointError, checked
from llmkit.errors import InvalidRequestError

__all__ = ["act", "models_of"]

LIST_S, LOAD_S = 10.0, 3600.0


def models_of(base_url: str, api_key: str) -> list[dict[str, Any]]:
    """The models of an endpoint; of a gateway of ours that lets us, with their states.

    Raises `InvalidRequestError` for the address, and `EndpointError`.
    """
    endpoint = Endpoint(base_url, api_key)
    reply = checked(endpoint.call("GET", "/models", timeout_s=LIST_S)).json()
    if not (isinstance(reply, dict) and isinstance(reply.get("data"), list)):
        raise EndpointError(f"{base_url} lists no models: is it an OpenAI-compatible server?")
    models = [_with_phase(m) for m in _objects(reply, "data")]
    try:
        path = "/admin/models"
        reply = checked(endpoint.call("GET", path, at_root=True, timeout_s=LIST_S)).json()
    except EndpointError:  # another server, or a key that may not
        return models
    by_name = {m.get("id"): m for m in models}
    states = {m.get("id"): m for m in _objects(reply, "models")}
    names = dict.fromkeys([*states, *by_name])
    return [{"id": n, **by_name.get(n, {}), **states.get(n, {})} for n in names]


def _objects(reply: Any, name: str) -> list[dict[str, Any]]:
    found = reply.get(name) if isinstance(reply, dict) else None
    return [m for m in found if isinstance(m, dict)] if isinstance(found, list) else []


def _with_phase(model: dict[str, Any]) -> dict[str, Any]:
    """A model of `/v1/models`, with its status in the words of `/admin/models`."""
    status = model.get("status")
    return {**model, "phase": status.get("value")} if isinstance(status, dict) else model


def act(base_url: str, api_key: str, what: str, body: dict[str, Any]) -> dict[str, Any]:
    """Load or unload a model. Raises as `models_of` does."""
    endpoint = Endpoint(base_url, api_key)
    path = f"/admin/models/{what}"
    reply = endpoint.call("POST", path, body, at_root=True, timeout_s=LOAD_S)
    try:
        done = checked(reply).json()
    except EndpointError as error:
        if error.status != 404 or error.code == "model_not_found":
            raise
        message = f"{base_url} has no admin routes; start the gateway with --admin."
        raise InvalidRequestError(message, "base_url") from None
    if not (isinstance(done, dict) and isinstance(done.get("id"), str)):
        raise EndpointError(f"{base_url} does not say what it did: is it an llmkit gateway?")
    return done
