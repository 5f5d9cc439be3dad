"""What a gateway, or whatever is there in its place, answers instead: as errors of llmkit. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmkit.cluster.address import KEY, Address
from llmkit.errors import (
    AccessError,
    ContextLengthError,
    EngineError,
    EngineGoneError,
    InvalidRequestError,
    LimitError,
    LLMKitError,
    ModelBusyError,
    ModelLoadError,
    ModelNotFoundError,
    QueueFullError,
)

__all__ = ["BUSY", "another_server", "error_of", "no_gateway", "refusal", "retry_after", "said_in"]

TOO_LARGE = {413: "request", 414: "address", 431: "header"}
# For the moment: others are served, and nothing was begun.
BUSY = frozenset({"queue_full", "too_many_concurrent_requests", "server_busy"})
BY_CODE: dict[str, type[LLMKitError]] = {
    "model_not_found": ModelNotFoundError,
    "model_busy": ModelBusyError,
    "model_load_failed": ModelLoadError,
    "model_unavailable": EngineGoneError,
    "other_version": EngineGoneError,
    "queue_full": QueueFullError,
    "engine_error": EngineError,
}


def refusal(
    address: Address,
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    attaching: bool = False,
) -> LLMKitError:
    """The error for an answer that is none; header names are lower case. Only while ``attaching``
    it may say that no llmkit is there: later that is known better."""
    said = said_in(body)
    other = no_gateway if attaching else another_server
    if 300 <= status < 400:
        where = headers.get("location", "")
        return other(
            address, f"it sends everybody to {where:.200}" if where else f"status {status}"
        )
    if status == 401:
        return AccessError(_unknown_key(address, _message(said)))
    if status == 403 and said.get("code") != "not_allowed":
        return AccessError(_forbidden(address, _message(said)))
    is_unknown = status in (404, 405) and said.get("code") != "model_not_found"
    if is_unknown or "code" not in said:
        if status in (502, 503, 504):
            what = "the hub's service" if address.is_hub else "a gateway"
            return EngineGoneError(
                f"{address.base} is not there at the moment (status {status} from a proxy): {what} "
                "may be down or starting. Try again in a while."
            )
        if status == 429:
            return LimitError(_message(said) or "the server refuses it for now (status 429)")
        if status in TOO_LARGE:
            return InvalidRequestError(
                f"the {TOO_LARGE[status]} is larger than a proxy before {address.base} lets "
                f"through (status {status}). Send less, or have the proxy's limit raised."
            )
        if status >= 500:
            kind = EngineGoneError if attaching else EngineError
            return kind(
                f"{address.base} answers with status {status} and gives no reason: the server, or "
                "a proxy before it, has failed. Try again in a while; their logs say more."
            )
        return other(address, f"status {status}")
    return error_of(said, status)


def error_of(said: Mapping[str, Any], status: int = 500) -> LLMKitError:
    """The error that a gateway's error object tells of."""
    code, message = said.get("code"), _message(said) or f"the server answers with status {status}"
    param = said.get("param") if isinstance(said.get("param"), str) else None
    if code == "context_length_exceeded":
        sizes = said.get("n_prompt_tokens"), said.get("n_ctx")
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):
            return ContextLengthError(sizes[0], sizes[1], param)
        return InvalidRequestError(message, param)
    kind = BY_CODE.get(code) if isinstance(code, str) else None
    if kind is not None:
        return kind(message)
    if status == 429 or code in BUSY:
        return LimitError(message)
    if status == 403:
        return AccessError(message)
    if status in (400, 413):
        return InvalidRequestError(message, param)
    if status == 503:
        return EngineGoneError(message)
    return EngineError(message)


def no_gateway(address: Address, what: str) -> LLMKitError:
    """Something else is there."""
    said = f" ({what})" if what else ""
    if address.is_hub:
        return EngineGoneError(
            f"there is no llmkit at {address.base}{said}: has the hub a service of this name? "
            "The hub's admin adds it to c.JupyterHub.services."
        )
    return EngineGoneError(
        f"there is no llmkit gateway at {address.base}{said}. llmkit.attach needs one, of this "
        "version: `llmkit serve`, or a hub's. For another server with OpenAI's routes, use the "
        "openai package."
    )


def another_server(address: Address, what: str) -> LLMKitError:
    """Something else answers where llmkit was."""
    return EngineGoneError(
        f"it is not llmkit that answers at {address.base} now ({what}): a proxy before it has "
        "changed, or the server has moved. Try again in a while, or attach again."
    )


def said_in(body: bytes) -> Mapping[str, Any]:
    """The error object in a body; empty without one."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    error = found.get("error") if isinstance(found, dict) else None
    return error if isinstance(error, dict) else {}


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds after which it may be sent again."""
    text = headers.get("retry-after", "")
    return max(0.5, float(text)) if text.isascii() and text.isdigit() and len(text) < 6 else 2.0


def _message(said: Mapping[str, Any]) -> str:
    message = said.get("message")
    return f"{message:.2000}" if isinstance(message, str) else ""


def _unknown_key(address: Address, message: str) -> str:
    said = f" It says: {message}" if message else ""
    if address.is_hub:
        return (
            f"{address.base} does not accept this server's token: it is no token of this hub, or "
            f"no longer one. Stop this server on the hub's control panel and start it again.{said}"
        )
    return f"{address.base} wants a key: give key=, or set ${KEY}.{said}"


def _forbidden(address: Address, message: str) -> str:
    said = f" It says: {message}" if message else ""
    if not address.is_hub:
        return f"this key may not use {address.base}.{said}"
    scope = f"access:services!service={address.service}"
    return (
        f"this server's token may not use {address.base}: it lacks the scope {scope}. The hub's "
        f'admin adds "{scope}" to c.Spawner.server_token_scopes and to the role of the users '
        f"(c.JupyterHub.load_roles); after that, restart this server.{said}"
    )
