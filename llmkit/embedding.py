"""`LocalEmbedder`: a pooled model of this process behind the `EngineClient` protocol. One thread computes, texts of all callers batched by tokens."""

from __future__ import annotations

import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.backend.embedder import MAX_SEQUENCES, Embedder
from llmkit.backend.model import LlamaModel
from llmkit.errors import ContextLengthError, EngineError, InvalidRequestError, ModelUnloadedError
from llmkit.inquiries import answer
from llmkit.models import gguf
from llmkit.models.registry import ModelSpec
from llmkit.options import EngineOptions
from llmkit.stream import Stream
from llmkit.turns import Turns
from llmkit.types import EmbeddingRequest, Embeddings, EngineStats, GenerationRequest, Inquiry, ModelDescription

__all__ = ["LocalEmbedder"]

MAX_BATCH_TOKENS = 2048
PLACES = re.compile(r"(\{query\}|\{document\})")


@dataclass(slots=True)
class Job:
    """One request: its token sequences, and the vectors so far."""

    sequences: list[list[int]]
    normalize: bool
    future: Future[Embeddings]
    vectors: np.ndarray
    num_done: int = 0
    num_taken: int = 0
    started: float = field(default_factory=time.perf_counter)


class LocalEmbedder:
    """An `EngineClient` that embeds and does not generate. ``turns`` is shared with the other engines of the process."""

    def __init__(self, spec: ModelSpec, info: gguf.ModelInfo, options: EngineOptions, turns: Turns, name: str | None = None) -> None:
        self._pid = os.getpid()
        self._turns = turns
        self._model = LlamaModel(Path(spec.path), n_gpu_layers=-1 if options.n_gpu_layers == "auto" else options.n_gpu_layers)
        longest = min(options.n_ctx or MAX_BATCH_TOKENS, info.n_ctx_train or 512)
        try:
            self._embedder = Embedder(self._model, max_tokens=max(longest, min(MAX_BATCH_TOKENS, 4 * longest)), threads=options.threads)
        except BaseException:
            self._model.close()
            raise
        template = info.metadata.get("tokenizer.chat_template.rerank")
        self._template = template if isinstance(template, str) else None
        self.description = ModelDescription(
            name=name or spec.name,
            path=str(spec.path),
            architecture=info.architecture,
            quantization=info.quantization,
            n_params=self._model.n_params,
            n_ctx=longest,
            n_ctx_train=self._model.n_ctx_train,
            n_slots=MAX_SEQUENCES,
            n_vocab=self._model.vocab.n_tokens,
            weights_bytes=self._model.size_bytes,
            device_bytes=self._model.device_bytes,
            embedding_size=0 if self._embedder.ranks else self._embedder.size,
            ranks=self._embedder.ranks,
            created=int(time.time()),
        )
        self._stats = EngineStats(num_slots=MAX_SEQUENCES)
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: deque[Job] = deque()
        self._closed = False
        self._lock = threading.Lock()
        self._requests = self._prompt_tokens = 0
        self._thread = threading.Thread(target=self._run, name="llmkit-embedder", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        return self._closed

    def submit(self, request: GenerationRequest) -> Stream:
        raise InvalidRequestError(f"{self.description.name!r} makes embeddings and generates no text; use llm.embed().", "model")

    def abort(self, request_id: str) -> None:
        """Embedding is quick; there is nothing to abort."""

    def stats(self) -> EngineStats:
        return self._stats

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        """Queue texts. Raises `InvalidRequestError`, `ContextLengthError` and `ModelUnloadedError`; the future may hold an `EngineError`."""
        with self._lock:
            self._check_open()
            if self._embedder.ranks != (request.query is not None):
                kind, use = ("ranks documents for a query", "llm.rerank") if self._embedder.ranks else ("makes vectors and ranks no pairs", "llm.embed")
                raise InvalidRequestError(f"{self.description.name!r} {kind}; use {use}().", "model")
            sequences = [self._tokens(text, request.query) for text in request.inputs]
            job = Job(sequences, request.normalize and not self._embedder.ranks, Future(), np.empty((len(sequences), self._embedder.size), np.float32))
            self._inbox.put(job)
        return job.future

    def inquire(self, inquiry: Inquiry) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            self._check_open()
            future.set_result(answer(inquiry, self._model.vocab, None))
        return future

    def _check_open(self) -> None:
        if self._closed or self._pid != os.getpid():
            raise ModelUnloadedError(f"the model {self.description.name!r} was unloaded; load it again with llmkit.load().")

    def _tokens(self, text: str | tuple[int, ...], query: str | None) -> list[int]:
        n_ctx, n_vocab, vocab = self.description.n_ctx, self.description.n_vocab, self._model.vocab
        if isinstance(text, str) and query is not None:
            if self._template is not None:
                # What the template says may hold control tokens; what users say may not.
                given = {"{query}": query, "{document}": text}
                tokens = []
                for part in PLACES.split(self._template):
                    tokens += vocab.tokenize(given.get(part, part), add_special=False, parse_special=part not in given) if part else []
            else:
                tokens = vocab.pair(query, text)
        else:
            tokens = vocab.tokenize(text) if isinstance(text, str) else list(text)
        if not tokens:
            raise InvalidRequestError("a text to embed is empty.", "input")
        if len(tokens) > n_ctx:
            raise ContextLengthError(len(tokens), n_ctx, "input")
        if not all(isinstance(t, int) and 0 <= t < n_vocab for t in tokens):
            raise InvalidRequestError(f"input: token ids go from 0 to {n_vocab - 1}.", "input")
        return tokens

    # -- embedder thread

    def _run(self) -> None:
        while True:
            try:
                while True:
                    job = self._inbox.get(block=not self._jobs)
                    if job is None:
                        return self._fail_all()
                    if job.future.set_running_or_notify_cancel():
                        self._requests += 1
                        self._jobs.append(job)
            except queue.Empty:
                pass
            if self._jobs:
                self._step()

    def _step(self) -> None:
        """One batch: a sequence of each job in turn, so that a long list does not hold up a single text."""
        batch: list[tuple[Job, int]] = []
        room, waiting = self._embedder.max_tokens, list(self._jobs)
        while waiting and len(batch) < MAX_SEQUENCES:
            for job in list(waiting):
                if job.num_taken == len(job.sequences) or len(job.sequences[job.num_taken]) > room or len(batch) == MAX_SEQUENCES:
                    waiting.remove(job)
                    continue
                batch.append((job, job.num_taken))
                room -= len(job.sequences[job.num_taken])
                job.num_taken += 1
        try:
            with self._turns:
                vectors = self._embedder.encode([job.sequences[i] for job, i in batch])
        except Exception as error:
            for job in {id(j): j for j, _ in batch}.values():
                self._jobs.remove(job)
                job.future.set_exception(error if isinstance(error, EngineError) else EngineError(f"embedding failed: {error!r}"))
            return
        for (job, i), vector in zip(batch, vectors, strict=True):
            job.vectors[i] = vector
            job.num_done += 1
        for job in [j for j in self._jobs if j.num_done == len(j.sequences)]:
            self._jobs.remove(job)
            job.future.set_result(self._result(job))
        self._prompt_tokens += sum(len(job.sequences[i]) for job, i in batch)
        self._stats = EngineStats(num_running=len(self._jobs), num_slots=MAX_SEQUENCES, requests_total=self._requests, prompt_tokens_total=self._prompt_tokens)

    @staticmethod
    def _result(job: Job) -> Embeddings:
        vectors = job.vectors
        if job.normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return Embeddings(vectors.astype(np.float32).tobytes(), vectors.shape[1], tuple(map(len, job.sequences)))

    def _left(self) -> Iterator[Job]:
        """What is still in the inbox."""
        while True:
            try:
                job = self._inbox.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                yield job

    def _fail_all(self) -> None:
        waiting = [j for j in self._left() if j.future.set_running_or_notify_cancel()]
        for job in [*self._jobs, *waiting]:
            job.future.set_exception(ModelUnloadedError("the model was unloaded while this request ran"))

    def close(self) -> None:
        if self._pid != os.getpid():
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._inbox.put(None)
        self._thread.join()
        self._embedder.close()
        self._model.close()
