"""`llmkit keys`: API keys of gateways, in their database."""

from __future__ import annotations

import contextlib
import json as json_module
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.errors import InvalidRequestError

if TYPE_CHECKING:
    from llmkit.store.database import Database
    from llmkit.store.keys import KeyStore
    from llmkit.store.records import KeyRecord

__all__ = ["register"]

Name = Annotated[str, typer.Argument(help="Whose key it is; stands in logs and tables.")]
Expires = Annotated[
    str | None, typer.Option(help="Its last day (2027-01-31, UTC), a time, or a span (90d).")
]
DbUrl = Annotated[
    str | None,
    typer.Option(
        help="Database of the gateway, if not the default one; $LLMKIT_DB_URL keeps a password "
        "in it out of `ps`."
    ),
]
Config = Annotated[
    Path | None, typer.Option(help="The gateway's TOML file, which may name the database.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        name="keys",
        help="API keys of gateways: who may use them, and how much.",
        no_args_is_help=True,
    )
    group.command()(add)
    group.command("list")(list_keys)
    group.command()(revoke)
    group.command()(rotate)
    group.command()(fleet)
    app.add_typer(group, rich_help_panel="Serving")


@contextlib.contextmanager
def _database(
    db_url: str | None, config: Path | None, *, create: bool = False
) -> Iterator[Database]:
    from llmkit.settings.serving import read_settings
    from llmkit.store.database import open_database

    given = {} if db_url is None else {"db_url": db_url}
    database = open_database(read_settings(given, config).gateway.db_url, create=create)
    try:
        yield database
    finally:
        database.close()


@contextlib.contextmanager
def _keys(db_url: str | None, config: Path | None, *, create: bool = False) -> Iterator[KeyStore]:
    from llmkit.store.keys import KeyStore

    with _database(db_url, config, create=create) as database:
        yield KeyStore(database)


def add(
    name: Name,
    scope: Annotated[
        list[str] | None, typer.Option(help="inference (the default), admin; once for each.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model it may use, or a glob such as qwen*; once for each."),
    ] = None,
    expires: Expires = None,
    rate: Annotated[str | None, typer.Option(help="Requests, such as 60/minute.")] = None,
    concurrent: Annotated[int | None, typer.Option(help="Requests at once.")] = None,
    tokens_per_day: Annotated[int | None, typer.Option(help="Tokens a day (UTC).")] = None,
    tokens_per_month: Annotated[int | None, typer.Option(help="Tokens a month (UTC).")] = None,
    weight: Annotated[float, typer.Option(help="Its share of a busy model.")] = 1.0,
    db_url: DbUrl = None,
    config: Config = None,
    json: Json = False,
) -> int:
    """Make a key and print it: this once, since only its SHA-256 is kept."""
    from llmkit.settings.entries import KeyEntry
    from llmkit.store.records import KeyRecord, digest, new_secret

    secret, now = new_secret(), time.time()
    entry = KeyEntry(
        name=name,
        key_sha256=digest(secret),
        scopes=tuple(scope or ("inference",)),
        models=tuple(model or ("*",)),
        rate=rate,
        concurrent=concurrent,
        tokens_per_day=tokens_per_day,
        tokens_per_month=tokens_per_month,
        weight=weight,
    )
    record = KeyRecord(
        name,
        digest(secret),
        scopes=entry.scopes,
        models=entry.models,
        rate=rate,
        concurrent=concurrent,
        tokens_per_day=tokens_per_day,
        tokens_per_month=tokens_per_month,
        weight=weight,
        created_at=now,
        expires_at=_end(expires, now),
    )
    with _keys(db_url, config, create=True) as keys:
        keys.add(record)
    return _show_secret(record, secret, json)


def list_keys(db_url: DbUrl = None, config: Config = None, json: Json = False) -> int:
    """List the keys, what they may do and what they used; no secrets are kept to be shown."""
    from llmkit.store.keys import KeyStore
    from llmkit.store.usage import UsageStore

    now = time.time()
    today = datetime.fromtimestamp(now, UTC).date()
    with _database(db_url, config) as database:
        records = KeyStore(database).all()
        used = UsageStore(database).tokens(today.replace(day=1))
    rows = []
    for record in records:
        days = used.get(f"key {record.name}", {})
        tokens = {"tokens_today": days.get(today, 0), "tokens_this_month": sum(days.values())}
        rows.append((record, tokens))
    if json:
        print(json_module.dumps([_object(r, now) | tokens for r, tokens in rows], indent=2))
        return 0
    if not rows:
        print("there are no keys; make one with `llmkit keys add NAME`", file=sys.stderr)
        return 0
    _print_table([_row(record, tokens, now) for record, tokens in rows])
    return 0


def revoke(name: Name, db_url: DbUrl = None, config: Config = None, json: Json = False) -> int:
    """End a key for good; running gateways refuse it within a second."""
    with _keys(db_url, config) as keys:
        record = keys.revoke(name, time.time())
    if json:
        print(json_module.dumps(_object(record, time.time()), indent=2))
    else:
        print(f"llmkit: the key {name!r} is revoked", file=sys.stderr)
    return 0


def rotate(
    name: Name,
    expires: Expires = None,
    db_url: DbUrl = None,
    config: Config = None,
    json: Json = False,
) -> int:
    """Replace a key by a new one with the same name and limits, and print it this once."""
    from llmkit.store.records import digest, new_secret

    secret, now = new_secret(), time.time()
    ends = _end(expires, now)
    with _keys(db_url, config) as keys:
        record = keys.rotate(name, digest(secret), now, ends)
    return _show_secret(record, secret, json)


def _end(expires: str | None, now: float) -> float | None:
    """When a key ends. Raises `InvalidRequestError` for what is no time to come."""
    from llmkit.settings.allowances import read_expiry

    end = read_expiry(expires, now)
    if end is not None and end <= now:
        raise InvalidRequestError(f"--expires {expires} is in the past.", "expires")
    return end


def _show_secret(record: KeyRecord, secret: str, json: bool) -> int:
    if json:
        print(json_module.dumps({"key": secret} | _object(record, time.time()), indent=2))
    else:
        print(f"llmkit: the key of {record.name!r}, which is not shown again:", file=sys.stderr)
        print(secret)
    return 0


def _object(record: KeyRecord, now: float) -> dict[str, Any]:
    """The key for programs, with times in ISO 8601."""
    found = asdict(record)
    del found["sha256"]
    for field in ("created_at", "expires_at", "revoked_at", "last_used_at"):
        found[field] = None if found[field] is None else _iso(found[field])
    return {"name": record.name, "state": record.state(now)} | found


def _iso(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds")


def _row(record: KeyRecord, tokens: dict[str, int], now: float) -> dict[str, str]:
    def day(time: float | None) -> str:
        return "" if time is None else _iso(time)[:10]

    limits = [
        record.rate or "",
        f"{record.concurrent} at once" if record.concurrent else "",
        f"{record.tokens_per_day} tokens/day" if record.tokens_per_day else "",
        f"{record.tokens_per_month} tokens/month" if record.tokens_per_month else "",
        f"weight {record.weight:g}" if record.weight != 1 else "",
    ]
    return {
        "name": record.name,
        "state": record.state(now),
        "scopes": " ".join(record.scopes),
        "models": " ".join(record.models),
        "limits": ", ".join(filter(None, limits)),
        "tokens today": str(tokens["tokens_today"] or ""),
        "this month": str(tokens["tokens_this_month"] or ""),
        "created": day(record.created_at),
        "expires": day(record.expires_at),
        "last used": day(record.last_used_at),
    }


def _print_table(rows: list[dict[str, str]]) -> None:
    """The columns that say anything."""
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    for row in [{name: name for name in columns}, *rows]:
        print("  ".join(row[name].ljust(widths[name]) for name in columns).rstrip())


def fleet(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")],
) -> int:
    """Make the key that gateways and engines on other hosts share (`--fleet-key-file`)."""
    from llmkit.cluster.fleet_key import make_key

    try:
        make_key(file)
    except FileExistsError:
        raise InvalidRequestError(
            f"{file} exists already: engines that have its key would be locked out.", "file"
        ) from None
    print(f"{file}: copy it to all hosts of the fleet, readable by llmkit alone")
    return 0
