"""One file over HTTP, in parts: what has arrived stays, and the next request asks for the rest.

Runs on the caller's thread. Knows nothing of repositories.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from llmkit.errors import DownloadError
from llmkit.models.disk import is_full, lack_of_room
from llmkit.models.names import gigabytes
from llmkit.system.text import printable

__all__ = ["Part", "Progress", "Remote", "check_room", "transport_errors"]

INTERVAL_S = 0.1
SPEED_S = 3.0
CHUNK = 1 << 20
START = 4096  # bytes after which the start of a file is looked at
TRIES, FIRST_DELAY_S, MAX_DELAY_S = 6, 0.5, 30.0
RANGE = re.compile(r"bytes (\d+)-")
Phase = TypeVar("Phase", bound=str)


class Remote(Protocol):
    """A file elsewhere. ``etag`` is its SHA-256, or git's SHA-1, or neither."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def etag(self) -> str: ...

    @property
    def url(self) -> str: ...


class Progress(Generic[Phase]):
    """What a download says while it runs, and whether it is to stop."""

    def __init__(
        self,
        tell: Callable[[Phase, int, float], None],
        cancelled: Callable[[], bool],
        name: str,
    ) -> None:
        self._tell, self._cancelled, self._name = tell, cancelled, name
        self._told = 0.0
        self._marks: list[tuple[float, int]] = []

    def check(self, kept: int = 0) -> None:
        """Raises `DownloadError` if it was cancelled."""
        if self._cancelled():
            raise DownloadError(f"the download of {self._name} was cancelled{_kept(kept)}")

    def tell(self, phase: Phase, done: int, *, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self._told < INTERVAL_S:
            return
        self._told = now
        self._marks = [m for m in self._marks if now - m[0] < SPEED_S] + [(now, done)]
        began, had = self._marks[0]
        speed = (done - had) / (now - began) if now > began and done > had else 0.0
        self._tell(phase, done, speed)


def _kept(size: int) -> str:
    return f"; {gigabytes(size)} are kept, and the next try goes on from there." if size else "."


def check_room(folder: Path, need: int) -> None:
    """Raises `DownloadError` unless a disk has room for ``need`` bytes and a margin."""
    lack = lack_of_room(folder, need)
    if lack:
        raise DownloadError(
            f"{lack}. Free some, or choose another folder (models_dir, or HF_HOME for Hugging "
            "Face's cache)."
        )


class _Broken(Exception):
    """The connection ended early, or the server said to come back: worth another try."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class Part:
    """A file that is arriving: ``path`` holds what is here so far.

    ``start_fault`` says of a file's first bytes why nobody can want the rest, or None.
    """

    def __init__(
        self,
        path: Path,
        remote: Remote,
        progress: Progress[Any],
        start_fault: Callable[[Path], str | None],
    ) -> None:
        self._path, self._remote, self._progress = path, remote, progress
        self._start_fault = start_fault
        self._size = path.stat().st_size if path.is_file() else 0

    def complete(self) -> None:
        """Fetch what is missing, and compare the checksum. Raises `DownloadError`."""
        if self._size > self._remote.size or (self._size and self._start_fault(self._path)):
            self._begin_again()  # of another file, or damaged
        resumed = self._size > 0
        self._fetch_rest()
        if self.has_digest_of(self._path):
            return self._check_start()
        self._begin_again()
        if resumed:  # what was here may have been damaged: once more, from nothing
            self._fetch_rest()
            if self.has_digest_of(self._path):
                return self._check_start()
            self._begin_again()
        raise DownloadError(
            f"{self._remote.name} has another checksum than the Hub says ({self._remote.etag}): it "
            "was damaged on its way, and was removed. Try again; if it happens again, a proxy or "
            "the Hub is at fault."
        )

    def become(self, target: Path) -> None:
        """Take the place of ``target``, all at once."""
        with self._writing():
            os.replace(self._path, target)

    def has_digest_of(self, path: Path) -> bool:
        """Whether a file has the checksum of the remote one. Git's is of a header and the file."""
        etag = self._remote.etag
        if re.fullmatch("[0-9a-f]{64}", etag):
            digest = hashlib.sha256()
        elif re.fullmatch("[0-9a-f]{40}", etag):
            digest = hashlib.sha1(f"blob {self._remote.size}\0".encode(), usedforsecurity=False)
        else:
            return True  # no checksum that we know; the size was right
        done = 0
        try:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    done += len(chunk)
                    self._progress.check(self._size)
                    self._progress.tell("verifying", done)
        except OSError as error:
            why = error.strerror or error
            raise DownloadError(f"{printable(str(path))} cannot be read: {why}.") from None
        return digest.hexdigest() == etag

    def _check_start(self) -> None:
        """Raises `DownloadError`, and keeps nothing, before gigabytes of it have come."""
        fault = self._start_fault(self._path)
        if fault is not None:
            with contextlib.suppress(PermissionError):  # Windows, while it is open: at the next try
                self._begin_again()
            raise DownloadError(
                f"{self._remote.name} cannot be used: what the Hub sends {fault}. It was not "
                "kept; choose another file or repository."
            )

    def _begin_again(self) -> None:
        self._path.unlink(missing_ok=True)
        self._size = 0

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            path = printable(str(self._path))
            with contextlib.suppress(OSError):
                self._size = self._path.stat().st_size
            if is_full(error):
                raise DownloadError(
                    f"the disk is full: {gigabytes(self._size)} of "
                    f"{gigabytes(self._remote.size)} of {self._remote.name} are kept in {path}. "
                    f"Free {gigabytes(self._remote.size - self._size)} and try again, which goes "
                    "on from there, or remove that file."
                ) from None
            raise DownloadError(
                f"{path} cannot be written: {error.strerror or error}{_kept(self._size)}"
            ) from None

    def _fetch_rest(self) -> None:
        """Ask for what is missing until all is here; gives up after some tries without news."""
        tries, delay = 0, FIRST_DELAY_S
        while True:
            before = self._size
            try:
                with self._writing(), self._path.open("ab") as file:
                    if self._size < self._remote.size:
                        self._receive(file)
                    file.flush()
                    os.fsync(file.fileno())
                return
            except _Broken as broken:
                tries, delay = (0, FIRST_DELAY_S) if self._size > before else (tries + 1, delay)
                if tries == TRIES:
                    raise DownloadError(
                        f"{self._remote.name} could not be fetched: {broken}{_kept(self._size)}"
                    ) from None
                self._pause(max(delay, min(broken.wait_s, MAX_DELAY_S)))
                delay = min(2 * delay, MAX_DELAY_S)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._progress.check(self._size)
            self._progress.tell("downloading", self._size)
            time.sleep(min(INTERVAL_S, max(0.0, end - time.monotonic())))

    def _receive(self, file: Any) -> None:
        """One request. Raises `_Broken` if it ends before all is here."""
        with _response(self._remote.url, self._size) as (status, headers, chunks):
            if self._size and not (status == 206 and _starts_at(headers, self._size)):
                file.truncate(0)  # the server knows no ranges, or not this one
                self._size = 0
            if status == 416:
                raise _Broken("the Hub does not know the rest of the file")
            for chunk in chunks:
                if self._size + len(chunk) > self._remote.size:
                    raise DownloadError(
                        f"the Hub sends more of {self._remote.name} than the "
                        f"{gigabytes(self._remote.size)} that it has."
                    )
                file.write(chunk)
                self._size += len(chunk)
                if self._size - len(chunk) < START <= self._size:
                    file.flush()
                    self._check_start()
                self._progress.check(self._size)
                self._progress.tell("downloading", self._size)
        if self._size < self._remote.size:
            raise _Broken("the connection ended early")
        self._progress.tell("downloading", self._size, last=True)


def _starts_at(headers: Any, start: int) -> bool:
    match = RANGE.match(headers.get("Content-Range", ""))
    return match is not None and int(match[1]) == start


@contextlib.contextmanager
def _response(url: str, start: int) -> Iterator[tuple[int, Any, Iterator[bytes]]]:
    """Status, headers and bytes of a GET from ``start`` on.

    A redirect to another host does not get the token. Raises `_Broken`, and `DownloadError` for a
    refusal.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    session: Any = get_session()
    how: dict[str, Any] = {"headers": headers, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
    with contextlib.ExitStack() as stack:
        with _transport():
            if callable(getattr(session, "stream", None)):  # httpx, or below 1.0 requests
                opened = session.stream("GET", url, follow_redirects=True, **how)
            else:
                opened = session.get(url, stream=True, **how)
            response = stack.enter_context(opened)
        code = response.status_code
        if code in (408, 429, 500, 502, 503, 504):
            wait = response.headers.get("Retry-After", "")
            raise _Broken(
                f"the Hub answers with status {code}",
                float(wait) if re.fullmatch("[0-9]{1,9}", wait) else 0,
            )
        if code not in (200, 206, 416):
            raise DownloadError(
                f"the Hub does not send the file (status {code}): check the token in HF_TOKEN and "
                "the terms of the repository, and try again."
            )
        read = getattr(response, "iter_bytes", None) or (lambda: response.iter_content(1 << 16))
        yield code, response.headers, _chunks(read)


def _chunks(read: Callable[[], Iterator[bytes]]) -> Iterator[bytes]:
    with _transport():
        chunks = iter(read())
    while True:
        with _transport():
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


@contextlib.contextmanager
def _transport() -> Iterator[None]:
    """What the HTTP library raises is a broken connection."""
    try:
        yield
    except transport_errors() as error:
        raise _Broken(str(error) or type(error).__name__) from None


def transport_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub's HTTP library raises: httpx's base class, or requests' (an OSError)."""
    from huggingface_hub.errors import HfHubHTTPError

    bases: list[Any] = [c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError"]
    return (OSError, *bases)
