"""The tables of a settings file: a model, ``[models.NAME]``, and a key, ``[keys.NAME]``. Pure."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.settings import table
from llmkit.settings.allowances import check_name
from llmkit.settings.table import Option, option
from llmkit.settings.values import check_tokens

__all__ = ["KEY_OPTIONS", "MODEL_OPTIONS", "KeyEntry", "ModelEntry"]

MODEL, KEY = "Model", "Key"
MOST_TOKENS, MOST_BUDGET = 2**31 - 1, 10**15
DAY_S = 86_400.0
SHA256 = r"[0-9a-fA-F]{64}"
NAME = re.compile(r"[^\s\x00-\x1f\x7f]{1,200}")
RESERVED = "default"  # the name that stands for another model


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """A model that is served.

    ``name`` is what callers say; None is the file's own. ``engine`` holds the options of its engine
    that were set, for it or for all models, and ``sampling`` the defaults that were set for it
    alone. ``tuned``, ``force``, ``lazy``, ``idle_unload_s`` and ``replicas`` are those of all
    models where the table does not say. Raises `InvalidRequestError` naming the option.
    """

    name: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    model: str = option(
        "text", "", "Alias, path of a GGUF file, or org/repo:Q4_K_M of the Hub; by default the "
        "table's name.", MODEL,
    )  # fmt: skip
    aliases: tuple[str, ...] = option("texts", (), "Other names of this model.", MODEL)
    pinned: bool = option("flag", False, "Never unload it to make room for others.", MODEL)
    lazy: bool = option("flag", False, "Load it when it is first asked for.", MODEL)
    idle_unload_s: float | None = option(
        "number", None, "Unload it after so long without a request.", MODEL,
        low=1.0, high=365 * DAY_S, unit="s",
    )  # fmt: skip
    tuned: bool = option(
        "flag", False, "Use the settings that `llmkit tune` found on this machine.", MODEL
    )
    force: bool = option(
        "flag", False, "Load it even if it is not expected to fit into memory.", MODEL
    )
    default_max_tokens: int | None = option(
        "integer", None, "Longest answer of a request that does not say.", MODEL,
        low=1, high=MOST_TOKENS, unit="tokens", live=True,
    )  # fmt: skip
    max_tokens_limit: int | None = option(
        "integer", None, "Longest answer that a request may ask for.", MODEL,
        low=1, high=MOST_TOKENS, unit="tokens", live=True,
    )  # fmt: skip
    replicas: int = option(
        "integer", 1, "Processes for it; their threads share the cores.", MODEL, low=1, high=256
    )
    weight: float = option(
        "number", 1.0, "Its share where models compete.", MODEL, low=0.01, high=100.0
    )

    def __post_init__(self) -> None:
        table.check(self)
        for name in (self.name, *self.aliases):
            if name is not None and (NAME.fullmatch(name) is None or name == RESERVED):
                raise InvalidRequestError(
                    f"a name of a model must have 1 to 200 characters and no spaces, and "
                    f"{RESERVED!r} stands for another one; {name!r:.80} will not do.",
                    "aliases" if name in self.aliases else None,
                )
        check_tokens(self.default_max_tokens, self.max_tokens_limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyEntry:
    """A key of the settings: whose it is, what it opens and how much it may use.

    Raises `InvalidRequestError` naming the option, which does not show the key.
    """

    name: str
    key: str | None = option(
        "secret", None, "The key itself; better keep its key_sha256 only.", KEY, live=True
    )
    key_sha256: str | None = option(
        "text", None, "SHA-256 of the key: printf %s KEY | sha256sum.", KEY, live=True,
        pattern=SHA256, wanted="64 hexadecimal digits, as of: printf %s KEY | sha256sum",
    )  # fmt: skip
    scopes: tuple[str, ...] = option(
        "texts", ("inference",), "What it may do.", KEY, choices=("inference", "admin"), live=True
    )
    models: tuple[str, ...] = option(
        "globs", ("*",), "Models that it may use, as names or globs such as qwen*.", KEY, live=True
    )
    rate: str | None = option("rate", None, "Its requests, such as 60/minute.", KEY, live=True)
    concurrent: int | None = option(
        "integer", None, "Its requests at once; by default max_concurrent.", KEY,
        low=1, high=100_000, live=True,
    )  # fmt: skip
    tokens_per_day: int | None = option(
        "integer", None, "Its tokens a day (UTC), prompts and answers.", KEY,
        low=1, high=MOST_BUDGET, unit="tokens", live=True,
    )  # fmt: skip
    tokens_per_month: int | None = option(
        "integer", None, "Its tokens a month (UTC), prompts and answers.", KEY,
        low=1, high=MOST_BUDGET, unit="tokens", live=True,
    )  # fmt: skip
    expires: str | date | None = option(  # noqa: RUF009  # a date does not change
        "moment", None, "The last day it opens anything (UTC), or the time it ends.", KEY, live=True
    )
    enabled: bool = option("flag", True, "false keeps it out for now.", KEY, live=True)
    weight: float = option(
        "number", 1.0, "Its share of a busy model.", KEY, low=0.01, high=100.0, live=True
    )

    def __post_init__(self) -> None:
        check_name(self.name)
        table.check(self)
        if (self.key is None) == (self.key_sha256 is None):
            raise InvalidRequestError(
                "a key needs either key or key_sha256, and not both.", "key_sha256"
            )
        for listed in ("scopes", "models"):
            if not getattr(self, listed):
                raise InvalidRequestError(
                    f"{listed} must name at least one; to keep a key out, set enabled = false.",
                    listed,
                )

    @property
    def sha256(self) -> str:
        """Of its secret, in lower case."""
        if self.key is not None:
            return hashlib.sha256(self.key.encode()).hexdigest()
        return str(self.key_sha256).lower()


MODEL_OPTIONS: dict[str, Option] = table.table(ModelEntry)
KEY_OPTIONS: dict[str, Option] = table.table(KeyEntry)
