"""How much a hub's users may use: ``[quota.default]`` and ``[quota.groups.NAME]``. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from llmkit.settings import table
from llmkit.settings.table import Option, option

__all__ = ["QUOTA_OPTIONS", "Quota", "Quotas"]

QUOTA = "Quota"
MOST_TOKENS = 10**15


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What one user may use; None is without a limit.

    Raises `InvalidRequestError` naming the option.
    """

    tokens_per_day: int | None = option(
        "integer", None, "Tokens in any 24 hours, prompts and answers.", QUOTA,
        low=1, high=MOST_TOKENS, unit="tokens", live=True,
    )  # fmt: skip
    requests_per_minute: int | None = option(
        "integer", None, "Requests in any minute.", QUOTA, low=1, high=1_000_000_000, live=True
    )
    concurrent: int | None = option(
        "integer", None, "Requests at once; by default max_concurrent.", QUOTA,
        low=1, high=100_000, live=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        table.check(self)


QUOTA_OPTIONS: dict[str, Option] = table.table(Quota)


@dataclass(frozen=True, slots=True)
class Quotas:
    """The quota of users whose groups have no table, and those of the ``groups``.

    What a group's table does not say is as in the default one.
    """

    default: Quota = field(default_factory=Quota)
    groups: Mapping[str, Quota] = field(default_factory=dict)

    @classmethod
    def of(
        cls, default: Mapping[str, int | None], groups: Mapping[str, Mapping[str, int | None]]
    ) -> Quotas:
        """From the values that were set. Raises `InvalidRequestError` naming an option."""
        made = {name: Quota(**{**default, **own}) for name, own in groups.items()}
        return cls(Quota(**default), made)

    def of_groups(self, names: Collection[str]) -> Quota:
        """The most generous of each limit among the groups of a user.

        >>> quotas = Quotas.of({"concurrent": 1}, {"ta": {"concurrent": 4}, "lab": {}})
        >>> quotas.of_groups({"lab", "ta"}).concurrent, quotas.of_groups({"else"}).concurrent
        (4, 1)
        """
        own = [self.groups[name] for name in names if name in self.groups]
        if not own:
            return self.default
        return Quota(
            **{name: _most(getattr(quota, name) for quota in own) for name in QUOTA_OPTIONS}
        )


def _most(limits: Iterable[int | None]) -> int | None:
    found = list(limits)
    return None if None in found else max(limit for limit in found if limit is not None)
