"""A model that says what a test wants it to say, at the pace that it wants, behind a gateway that
runs in a thread of its own: for tests that drive a browser."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tornado.netutil import bind_sockets

from llmkit.gateway.access.keys import Keys
from llmkit.gateway.app import Gateway, make_app, make_server
from llmkit.gateway.conversations.shelf import Shelf
from llmkit.gateway.directory import EngineDirectory
from llmkit.protocol import (
    READY,
    Completion,
    Delta,
    DescribeVocabulary,
    EmbeddingRequest,
    Embeddings,
    EngineState,
    EngineStats,
    FinishReason,
    GenerationRequest,
    Inquiry,
    ModelDescription,
    Origin,
    RequestMetrics,
    Tokenize,
    TokenizeChat,
    Tokens,
    Usage,
    Vocabulary,
)
from llmkit.protocol.client import EngineClient
from llmkit.protocol.stream import Channel, Stream
from llmkit.store.database import open_database

TOKEN = 4  # characters


class ScriptedModel:
    """An `EngineClient`: ``script`` gives its answer to what the user said last."""

    def __init__(self, name: str = "scripted", **description: Any) -> None:
        self.script: Callable[[str], str] = lambda said: f"You said: {said}"
        self.token_s = 0.002
        self.asked: list[GenerationRequest] = []
        self._aborted: set[str] = set()
        self.description = ModelDescription(
            name, f"{name}.gguf", n_ctx=8192, n_slots=4, n_vocab=256, weights_bytes=1000,
            created=int(time.time()), **description,
        )  # fmt: skip

    state: EngineState = READY

    @property
    def origin(self) -> Origin:
        return Origin.here()

    def submit_choices(self, request: GenerationRequest) -> list[Stream]:
        return [self.submit(choice) for choice in request.choices()]

    def submit(self, request: GenerationRequest) -> Stream:
        self.asked.append(request)
        said = [m.text for m in request.messages or () if m.role == "user"]
        text = self.script(said[-1] if said else "")
        prompt = sum(len(m.text) for m in request.messages or ()) // TOKEN + 1
        channel = Channel(request.request_id, self.abort)
        threading.Thread(
            target=self._speak, args=(channel, text, prompt, request.sampling.max_tokens),
            daemon=True,
        ).start()  # fmt: skip
        return Stream(channel)

    def _speak(self, channel: Channel, text: str, prompt: int, most: int | None) -> None:
        tokens = [text[i : i + TOKEN] for i in range(0, len(text), TOKEN)]
        reason, count, begun = FinishReason.STOP, 0, time.monotonic()
        for token in tokens:
            if channel.request_id in self._aborted:
                reason = FinishReason.ABORT
                break
            if most is not None and count >= most:
                reason = FinishReason.LENGTH
                break
            count += 1
            time.sleep(max(0.0, begun + count * self.token_s - time.monotonic()))
            channel.push(Delta(token, 1))
            channel.wake()
        usage = Usage(prompt, count, cached_tokens=prompt // 2)
        spoke_s = time.monotonic() - begun
        metrics = RequestMetrics(decode_s=spoke_s, prompt_tokens=prompt, completion_tokens=count)
        channel.finish(Completion("".join(tokens[:count]), reason, usage, metrics))
        channel.wake()

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        raise AssertionError("a scripted model only speaks: no test asks it for vectors")

    def inquire(self, inquiry: Inquiry[Any]) -> Future[Any]:
        future: Future[Any] = Future()
        match inquiry.question:
            case DescribeVocabulary():
                future.set_result(Vocabulary("", "\0", False, ""))
            case Tokenize(text):
                future.set_result(Tokens(tuple(range(len(text) // TOKEN + 1)), None))
            case TokenizeChat() as question:
                size = sum(len(m.text) for m in question.messages) // TOKEN + 1
                future.set_result(Tokens(tuple(range(size)), None))
        return future

    def abort(self, request_id: str) -> None:
        self._aborted.add(request_id)

    def stats(self) -> EngineStats:
        return EngineStats(num_slots=4, kv_capacity_tokens=8192)

    def close(self) -> None:
        """There is nothing to release."""


class _Here:
    def __init__(self, engines: list[ScriptedModel]) -> None:
        self._engines = engines

    def find(self) -> Mapping[Hashable, Callable[[], EngineClient]]:
        return {e.description.name: lambda e=e: e for e in self._engines}  # type: ignore[misc]


class ServedModels:
    """A gateway with sessions in front of scripted models, until ``stop``."""

    def __init__(self, folder: Path, *models: ScriptedModel, key: str | None = None,
                 **options: Any) -> None:  # fmt: skip
        self.url = ""
        self._ready = threading.Event()
        self._args = (folder, models, key, options)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._ready.wait(30)

    async def _run(self) -> None:
        folder, models, key, options = self._args
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        directory = EngineDirectory([_Here(list(models))])
        shelf = Shelf(lambda: open_database(f"sqlite:///{folder}/sessions.db"))
        self._gateway = gateway = Gateway(directory, sessions=shelf, **options)
        server = make_server(make_app(gateway, Keys(key, "127.0.0.1")))
        sockets = bind_sockets(0, "127.0.0.1")
        server.add_sockets(sockets)
        self.url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/"
        self._ready.set()
        await self._stop.wait()
        server.stop()
        await gateway.sockets.close()
        await gateway.turns.close()
        await server.close_all_connections()
        directory.close()

    def cut_sockets(self) -> None:
        """Close all chat sockets, as a network does."""

        def cut() -> None:
            for connection in list(self._gateway.sockets._who):
                connection.cut()

        self._loop.call_soon_threadsafe(cut)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
