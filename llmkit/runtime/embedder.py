"""`LocalEmbedder`: a pooled model of this process behind the `EngineClient` protocol.

One thread computes; the texts of all callers are batched by tokens.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import numpy as np

from llmkit.backend.embedder import MAX_SEQUENCES, Embedder
from llmkit.backend.model import LlamaModel
from llmkit.engine.admission import Admission, MakeWay
from llmkit.errors import (
    ContextLengthError,
    EngineError,
    EngineGoneError,
    InvalidRequestError,
    ModelUnloadedError,
    QueueFullError,
)
from llmkit.models import gguf
from llmkit.models.registry import ModelSpec
from llmkit.protocol import (
    EmbeddingRequest,
    Embeddings,
    EngineState,
    EngineStats,
    GenerationRequest,
    Inquiry,
    ModelDescription,
    Origin,
)
from llmkit.protocol.stream import Stream
from llmkit.runtime.assembly import placement_of
from llmkit.runtime.cpu_turns import CpuTurns
from llmkit.runtime.jobs import Job, JobQueue
from llmkit.runtime.lifetime import Lifetime
from llmkit.runtime.prompts import answer
from llmkit.runtime.reading import Reading
from llmkit.settings.options import EngineOptions

__all__ = ["LocalEmbedder"]

logger = logging.getLogger("llmkit.engine")
Answer = TypeVar("Answer")

MAX_BATCH_TOKENS = 2048
PLACES = re.compile(r"(\{query\}|\{document\})")


class LocalEmbedder:
    """An `EngineClient` that embeds only. ``turns`` is shared with the process's other engines."""

    def __init__(
        self,
        spec: ModelSpec,
        info: gguf.ModelInfo,
        options: EngineOptions,
        turns: CpuTurns,
        name: str | None = None,
    ) -> None:
        self._life = Lifetime()
        self._turns = turns
        self._model = LlamaModel(
            Path(spec.path),
            n_gpu_layers=-1 if options.n_gpu_layers == "auto" else options.n_gpu_layers,
            placement=placement_of(options),
        )
        longest = min(options.n_ctx or MAX_BATCH_TOKENS, info.n_ctx_train or 512)
        try:
            self._embedder = Embedder(
                self._model,
                max_tokens=max(longest, min(MAX_BATCH_TOKENS, 4 * longest)),
                threads=options.threads,
            )
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
            gpu_bytes=self._model.gpu_bytes,
            device="gpu" if self._model.gpu_bytes else "cpu",
            embedding_size=0 if self._embedder.ranks else self._embedder.size,
            ranks=self._embedder.ranks,
            created=int(time.time()),
            n_embd=self._model.n_embd,
            vocab_type=self._model.vocab.type,
        )
        self._stats = EngineStats(num_slots=MAX_SEQUENCES)
        self._inbox: queue.SimpleQueue[Job | MakeWay | str | None] = queue.SimpleQueue()
        self._jobs = JobQueue()
        self._admission = Admission(options.max_waiting)
        self._failure: str | None = None
        self._lock = threading.Lock()
        self._reading = Reading(self._lock, self._check_open)
        self._requests = self._prompt_tokens = 0
        self._thread = threading.Thread(target=self._run, name="llmkit-embedder", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        return self._life.closed

    @property
    def state(self) -> EngineState:
        return self._life.state(self.description.name, self._failure)

    @property
    def origin(self) -> Origin:
        return Origin.here()

    def submit(self, request: GenerationRequest) -> Stream:
        raise InvalidRequestError(
            f"{self.description.name!r} makes embeddings and generates no text; use llm.embed().",
            "model",
        )

    def submit_choices(self, request: GenerationRequest) -> list[Stream]:
        return [self.submit(request)]

    def abort(self, request_id: str) -> None:
        """End a request early: finish the running batch, skip the rest."""
        self._inbox.put(request_id)

    def stats(self) -> EngineStats:
        return self._stats

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        """Queue texts.

        Raises `InvalidRequestError`, `ContextLengthError`, `QueueFullError` and
        `ModelUnloadedError`; the future may hold an `EngineError`.
        """
        with self._reading():
            if self._embedder.ranks != (request.query is not None):
                kind, use = (
                    ("ranks documents for a query", "llm.rerank")
                    if self._embedder.ranks
                    else ("makes vectors and does not rank", "llm.embed")
                )
                raise InvalidRequestError(
                    f"{self.description.name!r} {kind}; use {use}().", "model"
                )
            sequences = [
                np.array(self._tokens(text, request.query), np.int32) for text in request.inputs
            ]
            vectors = np.empty((len(sequences), self._embedder.size), np.float32)
            job = Job(
                request.request_id,
                request.caller,
                sequences,
                request.normalize and not self._embedder.ranks,
                Future(),
                vectors,
                request.weight,
            )
        with self._lock:
            self._check_open()
            for caller in self._admission.enter(request.caller):
                self._inbox.put(MakeWay(caller))
            self._inbox.put(job)
        return job.future

    def inquire(self, inquiry: Inquiry[Answer]) -> Future[Answer]:
        future: Future[Answer] = Future()
        with self._reading():
            future.set_result(answer(inquiry.question, self._model.vocab, None))
        return future

    def _check_open(self) -> None:
        self._life.check(self.description.name, self._failure)

    def _tokens(self, text: str | tuple[int, ...], query: str | None) -> list[int]:
        n_ctx, n_vocab, vocab = self.description.n_ctx, self.description.n_vocab, self._model.vocab
        if isinstance(text, str) and query is not None:
            if self._template is not None:
                # The template may contain control tokens, user text may not.
                given = {"{query}": query, "{document}": text}
                tokens = []
                for part in PLACES.split(self._template):
                    tokens += (
                        vocab.tokenize(
                            given.get(part, part),
                            add_special=False,
                            parse_special=part not in given,
                            param="query" if part == "{query}" else "input",
                        )
                        if part
                        else []
                    )
            else:
                tokens = vocab.pair(query, text)
        else:
            tokens = vocab.tokenize(text, param="input") if isinstance(text, str) else list(text)
        if not tokens:
            raise InvalidRequestError("texts to embed must not be empty.", "input")
        if len(tokens) > n_ctx:
            raise ContextLengthError(len(tokens), n_ctx, "input")
        if not all(isinstance(t, int) and 0 <= t < n_vocab for t in tokens):
            raise InvalidRequestError(
                f"input: token ids must be in range (0–{n_vocab - 1}).", "input"
            )
        return tokens

    def _run(self) -> None:
        try:
            while self._take_messages():
                if len(self._jobs):
                    self._step()
            failure: Exception = ModelUnloadedError("the model was unloaded during this request")
        except BaseException as error:  # no request may wait forever
            logger.exception("the embedder stopped")
            self._failure = f"the embedder stopped: {error!r:.500}. Load the model again."
            failure = EngineGoneError(self._failure)
        self._fail_all(failure)

    def _take_messages(self) -> bool:
        """Empty the inbox; when idle, wait for a message. False: close."""
        while True:
            try:
                message = self._inbox.get(block=not len(self._jobs))
            except queue.Empty:
                return True
            if message is None:
                return False
            if isinstance(message, MakeWay):
                newest = next(
                    (
                        j
                        for j in reversed(list(self._jobs))
                        if j.caller == message.caller and not j.num_taken
                    ),
                    None,
                )
                if newest is not None and self._admission.owes(message.caller):
                    self._end(
                        newest,
                        QueueFullError(
                            "the queue is full, and this caller has the most requests in it; "
                            "try again later"
                        ),
                    )
                continue
            if isinstance(message, str):
                for job in [j for j in self._jobs if j.request_id == message]:
                    self._end(job, EngineError("this request was aborted"))
                self._publish()
                continue
            self._requests += 1
            if message.future.set_running_or_notify_cancel():
                self._jobs.add(message)
            else:
                self._admission.leave(message.caller)
            self._publish()

    def _end(self, job: Job, outcome: Exception | Embeddings) -> None:
        self._jobs.remove(job)
        self._admission.leave(job.caller)
        if isinstance(outcome, Exception):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)

    def _step(self) -> None:
        """Compute a batch."""
        batch = self._jobs.take(self._embedder.max_tokens, MAX_SEQUENCES)
        try:
            with self._turns:
                vectors = self._embedder.encode([job.sequences[i].tolist() for job, i in batch])
        except Exception as error:
            for job in {id(j): j for j, _ in batch}.values():
                self._end(
                    job,
                    error
                    if isinstance(error, EngineError)
                    else EngineError(f"embedding failed: {error!r}"),
                )
            return
        for (job, i), vector in zip(batch, vectors, strict=True):
            job.vectors[i] = vector
            job.num_done += 1
        self._prompt_tokens += sum(len(job.sequences[i]) for job, i in batch)
        for job in [
            j for j in {id(j): j for j, _ in batch}.values() if j.num_done == len(j.sequences)
        ]:
            self._end(job, job.result())
        self._publish()

    def _publish(self) -> None:
        waiting = sum(not job.num_taken for job in self._jobs)
        self._stats = EngineStats(
            num_running=len(self._jobs) - waiting,
            num_waiting=waiting,
            num_slots=MAX_SEQUENCES,
            requests_total=self._requests,
            prompt_tokens_total=self._prompt_tokens,
        )

    def _left(self) -> Iterator[Job]:
        """The jobs still in the inbox."""
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(message, Job):
                yield message

    def _fail_all(self, failure: Exception) -> None:
        with self._lock:  # nothing is added from here on
            left = list(self._left())
        waiting = [j for j in left if j.future.set_running_or_notify_cancel()]
        for job in [*self._jobs, *waiting]:
            job.future.set_exception(failure)

    def close(self) -> None:
        if not self._life.is_ours:
            return
        with self._lock:
            if self._life.closed:
                return
            self._life.closed = True
            self._inbox.put(None)
        self._thread.join()
        if self._reading.ended():
            self._embedder.close()
            self._model.close()
