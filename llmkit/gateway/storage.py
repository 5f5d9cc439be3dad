"""Models on disk, for the gateway: downloaded and removed on threads. Tornado loop only."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from llmkit.errors import LLMKitError, ModelBusyError
from llmkit.models.download import Downloaded, DownloadEvent, download
from llmkit.models.library import Library, StoredModel
from llmkit.models.removal import Removed, files_to_remove, remove

__all__ = ["Storage"]


@dataclass(frozen=True, slots=True)
class _End:
    """What a download's thread says last."""

    downloaded: Downloaded | None = None
    error: BaseException | None = None


class Storage:
    """The models of a folder; without one, of Hugging Face's cache.

    ``held`` gives files, links resolved, that stay: of models that are being loaded, say.
    """

    def __init__(self, library: Library, held: Callable[[], frozenset[Path]] = frozenset) -> None:
        self._library, self._held = library, held

    async def models(self) -> list[StoredModel]:
        return list(await asyncio.to_thread(self._library.models))

    async def pull(self, name: str) -> AsyncIterator[DownloadEvent | Downloaded]:
        """Download a model: events, and last what was downloaded. Leaving the iteration ends it;
        what arrived is kept.

        Raises what `llmkit.models.download.download` raises.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[DownloadEvent | _End] = asyncio.Queue()
        cancelled = threading.Event()

        def put(event: DownloadEvent | _End) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        def run() -> None:
            try:
                done = download(
                    name,
                    models_dir=self._library.folder,
                    on_event=put,
                    cancelled=cancelled.is_set,
                )
                put(_End(done))
            except BaseException as error:
                put(_End(error=error))

        threading.Thread(target=run, name="llmkit-download", daemon=True).start()
        try:
            looked: list[DownloadEvent] = []  # told once it is known that there is something
            while True:
                event = await events.get()
                if isinstance(event, DownloadEvent) and event.phase == "looking":
                    looked.append(event)
                    continue
                if isinstance(event, _End) and event.error is not None:
                    raise event.error
                while looked:
                    yield looked.pop()
                if isinstance(event, DownloadEvent):
                    yield event
                    continue
                assert event.downloaded is not None
                yield event.downloaded
                return
        finally:
            cancelled.set()

    async def id_of(self, downloaded: Downloaded) -> str | None:
        """What a model that was downloaded is called here; None if it is gone already."""
        models = await self.models()
        return next((m.id for m in models if m.path == downloaded.path), None)

    async def remove(self, name: str, in_use: frozenset[Path]) -> Removed:
        """Remove a model's files.

        Raises `ModelNotFoundError`, `ModelBusyError` if it is in use, `InvalidRequestError` for
        one that is not to be removed, and `LLMKitError` if the disk refuses.
        """
        return await asyncio.to_thread(self._remove, name, in_use)

    def _remove(self, name: str, in_use: frozenset[Path]) -> Removed:
        model = self._library.find(name)
        # It may be a copy in another type that is loaded.
        files = {file.resolve() for file in files_to_remove(self._library, model)}
        if files & (in_use | self._held()):
            raise ModelBusyError(
                f"the model {model.id!r} is in use: it is loaded or being loaded, or a loaded "
                "model needs it, as its draft model say. Unload that model first."
            )
        try:
            return remove(self._library, model)
        except OSError as error:
            raise LLMKitError(f"{model.id} cannot be removed: {error.strerror}.") from error
