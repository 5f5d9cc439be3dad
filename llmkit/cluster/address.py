"""Where a gateway is, and the key for it: named by hand, or by a hub's environment. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote

from llmkit.errors import InvalidRequestError
from llmkit.system.urls import UNRESERVED, http_parts

__all__ = ["HUB", "HUB_URL", "KEY", "Address", "hub_address"]

HUB = "hub"  # what people call it
HUB_URL, HUB_TOKEN = "LLMKIT_HUB_URL", "JUPYTERHUB_API_TOKEN"
KEY = "LLMKIT_API_KEY"
SERVICE = "services/llmkit"


@dataclass(frozen=True, slots=True)
class Address:
    """A gateway's ``base``, under which its routes are, and its parts.

    ``is_hub``: the key is a hub's token, and the gateway its service.

    >>> Address.of("https://example.org/services/llmkit/v1/", "secret").base
    'https://example.org/services/llmkit'
    """

    base: str
    host: str
    port: int
    is_secure: bool
    path: str
    key: str = field(repr=False)
    is_hub: bool = False

    @classmethod
    def of(cls, url: str, key: str, *, is_hub: bool = False) -> Address:
        """From what a user wrote. Raises `InvalidRequestError` for what is no address."""
        found = http_parts(url)
        if found is None:
            raise InvalidRequestError(
                "a gateway's address looks like https://example.org/services/llmkit, "
                f"not {url!r:.200}",
                "url",
            )
        parts, port = found
        if "@" in parts.netloc:
            raise InvalidRequestError(
                "a gateway's address has no user or password in it; give the key as key=.", "url"
            )
        if any(not " " < c < "\x7f" for c in key):
            raise InvalidRequestError("the key holds characters that no key has.", "key")
        is_secure = parts.scheme == "https"
        path = quote(parts.path.rstrip("/"), safe=UNRESERVED).removesuffix("/v1").rstrip("/")
        return cls(
            f"{parts.scheme}://{parts.netloc}{path}",
            str(parts.hostname),
            port,
            is_secure,
            path,
            key,
            is_hub,
        )

    @property
    def netloc(self) -> str:
        """What a Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_secure else 80) else f"{host}:{self.port}"

    @property
    def service(self) -> str:
        """The name of a hub's service, which scopes have."""
        name = self.path.rpartition("/services/")[2].strip("/")
        return name.partition("/")[0] or "llmkit"


def hub_address(environment: Mapping[str, str], key: str | None = None) -> Address:
    """The service of the hub that has started this server. Raises `InvalidRequestError`.

    >>> variables = {"JUPYTERHUB_PUBLIC_HUB_URL": "https://example.org/hub/"}
    >>> hub_address(variables, "token").base
    'https://example.org/services/llmkit'
    """
    url = environment.get(HUB_URL, "").strip()
    public = environment.get("JUPYTERHUB_PUBLIC_HUB_URL", "").strip().rstrip("/")
    if not url and public:
        url = f"{public.removesuffix('/hub')}/{SERVICE}"
    if not url:
        inside = "JUPYTERHUB_API_URL" in environment
        raise InvalidRequestError(
            (
                "this server does not know where its hub's llmkit is: the hub's admin sets "
                f'c.Spawner.environment = {{"{HUB_URL}": "http://PROXY/{SERVICE}/"}}. Until then '
                if inside
                else f"no hub has started this process (${HUB_URL} is not set): "
            )
            + f'name the address, as in llmkit.attach("https://HUB/{SERVICE}", key="TOKEN").',
            "hub",
        )
    token = key or environment.get(HUB_TOKEN, "")
    if not token:
        raise InvalidRequestError(
            f"there is no token for the hub: ${HUB_TOKEN} is not set here. Make one on the hub's "
            "page for tokens, and give it as key=.",
            "key",
        )
    return Address.of(url, token, is_hub=True)
