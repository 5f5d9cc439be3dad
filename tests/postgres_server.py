"""A real PostgreSQL of Debian's, on a socket in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fakes import wait_for

from llmkit.errors import StoreError
from llmkit.store.database import open_database

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """Its URL."""
    with tempfile.TemporaryDirectory(prefix="llmkit-") as folder:
        options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        if os.getuid() == 0:  # which PostgreSQL refuses to run as
            shutil.chown(folder, "postgres")
            options["user"] = "postgres"
        programs, data = PROGRAMS[-1].parent, f"{folder}/data"
        initdb = f"{programs}/initdb -D {data} -A trust -U llmkit -N"
        subprocess.run(initdb.split(), check=True, **options)
        command = f"{programs}/postgres -D {data} -k {folder} -c listen_addresses="
        server = subprocess.Popen(command.split(), **options)
        try:
            url = f"postgresql://llmkit@/postgres?host={folder}"
            wait_for(lambda: _opens(url), 30)
            yield url
        finally:
            server.terminate()
            server.wait(30)


def _opens(url: str) -> bool:
    try:
        open_database(url).close()
        return True
    except StoreError:
        return False
