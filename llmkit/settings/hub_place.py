"""Where a JupyterHub is, and who its service llmkit is to it: from the hub's variables. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from llmkit.errors import InvalidRequestError
from llmkit.settings.gateway import GATEWAY_OPTIONS
from llmkit.system.urls import http_parts

__all__ = ["HubPlace"]

API_URL, API_TOKEN = "JUPYTERHUB_API_URL", "JUPYTERHUB_API_TOKEN"
SERVICE_NAME, SERVICE_PREFIX = "JUPYTERHUB_SERVICE_NAME", "JUPYTERHUB_SERVICE_PREFIX"
SERVICE_URL, CLIENT_ID = "JUPYTERHUB_SERVICE_URL", "JUPYTERHUB_CLIENT_ID"
BASE_URL = "JUPYTERHUB_BASE_URL"
NAME = "llmkit"
SAMPLES = {
    API_URL: "http://HUB:8081/hub/api",
    API_TOKEN: "the api_token of this service in the hub's configuration",
}


@dataclass(frozen=True, slots=True)
class HubPlace:
    """A hub's ``api_url``, the service's ``token``, ``name`` and OAuth ``client_id``.

    ``prefix`` is the service's path at the hub's proxy, without a slash at its end, ``base_url``
    the hub's own. ``listen`` is the host and port at which a hub that has started the service
    expects it; None if it stands alone.

    >>> given = {"JUPYTERHUB_API_URL": "http://hub:8081/hub/api", "JUPYTERHUB_API_TOKEN": "t"}
    >>> HubPlace.of(given).prefix, HubPlace.of(given).scope
    ('/services/llmkit', 'access:services!service=llmkit')
    """

    api_url: str
    token: str = field(repr=False)
    name: str
    prefix: str
    base_url: str
    client_id: str
    listen: tuple[str, int] | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> HubPlace:
        """Raises `InvalidRequestError`, which names each variable that is missing or wrong."""
        given = {name: environment.get(name, "").strip() for name in environment}
        missing = [name for name in SAMPLES if not given.get(name)]
        if missing:
            raise InvalidRequestError(_missing(missing), missing[0])
        api_url = given[API_URL].rstrip("/")
        if http_parts(api_url) is None or not urlsplit(api_url).path.endswith("/hub/api"):
            raise _wrong(API_URL, api_url, f"an address such as {SAMPLES[API_URL]}")
        name = given.get(SERVICE_NAME) or NAME
        base_url = given.get(BASE_URL) or urlsplit(api_url).path.removesuffix("/hub/api") or "/"
        base_url = f"/{base_url.strip('/')}/".replace("//", "/")
        prefix = (given.get(SERVICE_PREFIX) or f"{base_url}services/{name}/").rstrip("/")
        if not prefix or re.fullmatch(GATEWAY_OPTIONS["base_path"].pattern, prefix) is None:
            raise _wrong(SERVICE_PREFIX, prefix, f"a path such as /services/{NAME}/")
        return cls(
            api_url,
            given[API_TOKEN],
            name,
            prefix,
            base_url,
            given.get(CLIENT_ID) or f"service-{name}",
            _listen(given.get(SERVICE_URL, "")),
        )

    @property
    def scope(self) -> str:
        """What callers need."""
        return f"access:services!service={self.name}"


def _listen(url: str) -> tuple[str, int] | None:
    if not url:
        return None
    found = http_parts(url)
    if found is None or found[0].scheme != "http":
        raise _wrong(
            SERVICE_URL,
            url,
            "the url of this service in the hub's configuration, such as http://127.0.0.1:3000; "
            "a hub with internal_ssl cannot start llmkit",
        )
    parts, port = found
    return str(parts.hostname), port


def _wrong(name: str, value: str, wanted: str) -> InvalidRequestError:
    return InvalidRequestError(f"${name} must be {wanted}, not {value!r:.100}.", name)


def _missing(names: list[str]) -> str:
    what = " and ".join(f"${name}" for name in names)
    samples = "; ".join(f"{name}={SAMPLES[name]}" for name in names)
    return (
        f"llmkit hub is a service of a JupyterHub, and {what} {'is' if len(names) == 1 else 'are'} "
        'not set. A hub sets them where it starts the service itself (command=["llmkit", "hub", '
        f'"MODEL"] in c.JupyterHub.services); elsewhere set them: {samples}. A server without a '
        "hub is `llmkit serve`."
    )
