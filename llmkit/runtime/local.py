"""`LocalEngine`: a model of this process behind the `EngineClient` protocol. Any thread.

With `opening` and `assembly` the only place that knows backend, chat, models and engine at once.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmkit.chat.template import CHATML, ChatTemplate
from llmkit.chat.tools import marks
from llmkit.engine.detokenize import Detokenizer, ResumedDetokenizer
from llmkit.engine.drafter import ModelDrafter
from llmkit.engine.engine import Engine
from llmkit.engine.request import Request
from llmkit.engine.resuming import resume
from llmkit.errors import (
    InsufficientMemoryError,
    InvalidRequestError,
    ModelUnloadedError,
)
from llmkit.models import gguf, memory
from llmkit.models.registry import ModelSpec, resolve
from llmkit.protocol import (
    EmbeddingRequest,
    Embeddings,
    EngineState,
    EngineStats,
    GenerationRequest,
    Inquiry,
    ListRequests,
    ListSlots,
    ListSteps,
    ModelDescription,
    Origin,
)
from llmkit.protocol.stream import Channel, Stream
from llmkit.runtime.assembly import estimate, load_draft, load_target
from llmkit.runtime.cpu_turns import CpuTurns
from llmkit.runtime.lifetime import Lifetime
from llmkit.runtime.preparing import Preparing
from llmkit.runtime.prompts import Prompt, answer, request_prompt
from llmkit.runtime.reading import Reading
from llmkit.runtime.running import running
from llmkit.runtime.switching import switching
from llmkit.runtime.threads import best_threads
from llmkit.settings.options import EngineOptions

if TYPE_CHECKING:
    from llmkit.backend.llama import LlamaRunner
    from llmkit.backend.model import LlamaModel, Loading
    from llmkit.runtime.media import MediaReader

__all__ = ["LocalEngine"]

Answer = TypeVar("Answer")


class LocalEngine:
    """An `EngineClient` for a model in this process.

    ``begun`` is what it needs and its weights, if they are being loaded already.
    Raises what `llmkit.load` documents. ``close()`` frees the memory and may be called twice;
    running requests end with `ModelUnloadedError`.
    """

    def __init__(
        self,
        model: str | Path | ModelSpec,
        options: EngineOptions | None = None,
        *,
        name: str | None = None,
        force: bool = False,
        on_progress: Callable[[float], None] = lambda _: None,
        begun: tuple[memory.MemoryEstimate, Loading] | None = None,
        **changes: Any,
    ) -> None:
        self._life = Lifetime()
        self._close_lock = threading.Lock()
        self._reading = Reading(self._close_lock, self._check_open)
        self._preparing = Preparing()
        options = EngineOptions(**changes) if options is None else replace(options, **changes)
        spec = resolve(model)
        info = gguf.read_header(spec.path)
        need, loading = begun or (estimate(info, options), None)
        if not (force or need.fits):
            raise InsufficientMemoryError(f"{info.path.name}: {need.advice()}")
        most = min(need.n_ctx, info.max_positions or need.n_ctx, need.kv_tokens)
        if options.draft is not None:
            resolve(options.draft)  # fail on a wrong name before anything is loaded
        source = str(info.metadata.get("tokenizer.chat_template") or CHATML)
        self._template = ChatTemplate(source)
        if loading is not None:
            self._template.compile()  # while the weights are read
        self._on_cpu = need.n_gpu_layers == 0
        # Without GPU all models of the process take turns; else this one's encoder may have to.
        self._turns = (
            running.turns if self._on_cpu else None if options.encode_beside else CpuTurns()
        )
        self._model, self._runner, self._media = load_target(
            spec, options, need, on_progress, loading, self._turns
        )
        self._draft: tuple[LlamaModel, LlamaRunner] | None = None
        try:
            self._start(spec, info, options, need, most, name, force)
        except BaseException:
            self._free()
            raise

    def _start(
        self,
        spec: ModelSpec,
        info: gguf.ModelInfo,
        options: EngineOptions,
        need: memory.MemoryEstimate,
        most: int,
        name: str | None,
        force: bool,
    ) -> None:
        if options.context_shift and not self._runner.can_shift:
            raise InvalidRequestError(
                "this model's positions cannot be shifted; load it without context_shift.",
                "context_shift",
            )
        self._context_shift = options.context_shift
        self._shares_prefixes = options.share_prefixes
        if options.draft is not None:
            self._draft = load_draft(self._model, options, need, force)
        if options.threads is None and self._on_cpu:
            with running.turns:
                self._runner.num_threads = best_threads(self._runner, spec)
        from llmkit.backend.grammar import GrammarCompiler

        self._grammars = GrammarCompiler(self._model.vocab)
        self._lora = tuple(sorted((Path(path).stem, scale) for path, scale in options.lora))
        vocab = self._vocab = self._model.vocab
        self._template.bos = vocab.token_text(vocab.bos)
        self._template.eos = vocab.token_text(vocab.eos)
        shown = marks(self._template.tool_form)
        self._marks = {
            t: text.encode() for t in vocab.control_tokens if (text := vocab.token_text(t)) in shown
        }
        self._description = ModelDescription(
            name=name or spec.name,
            path=str(spec.path),
            architecture=info.architecture,
            quantization=info.quantization,
            n_params=self._model.n_params,
            n_ctx=most,
            n_ctx_train=self._model.n_ctx_train,
            n_slots=need.n_slots,
            n_vocab=vocab.n_tokens,
            weights_bytes=self._model.size_bytes,
            kv_bytes=need.kv_bytes,
            compute_bytes=need.compute_bytes,
            device_bytes=self._runner.device_bytes,
            gpu_bytes=self._runner.gpu_bytes,
            device="gpu" if need.n_gpu_layers else "cpu",
            created=int(time.time()),
            tool_form=self._template.tool_form,
            reasoning=self._template.reasoning,
            reasons_after_results=self._template.reasons_after_results,
            n_embd=self._model.n_embd,
            vocab_type=vocab.type,
            adapters=options.lora,
            inputs=self._reader.inputs if self._reader is not None else (),
        )
        self._engine = Engine(
            self._runner,
            is_end=vocab.is_end,
            n_ctx=most,
            max_waiting=options.max_waiting,
            target_itl_s=None if options.deterministic else options.target_itl_ms / 1000,
            deterministic=options.deterministic,
            turns=self._turns,
            drafter=ModelDrafter(self._draft[1], self._turns) if self._draft else None,
            context_shift=options.context_shift,
            max_running=options.batch_requests if options.batching else 1,
            batch_wait_s=options.batch_wait_ms / 1000,
            encoder=self._media.encoder if self._media is not None else None,
            encoded_bytes=int(options.media_cache_mb * (1 << 20)),
        )
        running.add(self)
        switching.quicken()

    @property
    def description(self) -> ModelDescription:
        return self._description

    @property
    def closed(self) -> bool:
        return self._life.closed

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with the model's leading tokens."""
        with self._reading():
            return self._vocab.tokenize(text)

    def render(self, request: GenerationRequest) -> list[int]:
        """The prompt tokens of a request: chat template applied, tokenized, checked. Those of
        images and sounds are negative.

        Raises `InvalidRequestError`, `ContextLengthError` and `ModelUnloadedError`.
        """
        with self._reading():
            return self._prompt(request).tokens

    @property
    def _reader(self) -> MediaReader | None:
        return self._media.reader if self._media is not None else None

    def _prompt(self, request: GenerationRequest) -> Prompt:
        n_ctx, salt = self._description.n_ctx, self._salt(request)
        return request_prompt(request, self._vocab, self._template, n_ctx, self._reader, salt)

    def _salt(self, request: GenerationRequest) -> str:
        return request.cache_salt if self._shares_prefixes else request.salt

    @property
    def state(self) -> EngineState:
        return self._life.state(self._description.name, self._engine.failure)

    @property
    def origin(self) -> Origin:
        return Origin.here()

    def submit(self, request: GenerationRequest) -> Stream:
        return self.submit_choices(request)[0]

    def submit_choices(self, request: GenerationRequest) -> list[Stream]:
        n_vocab = self._description.n_vocab
        for token, _ in request.sampling.logit_bias:
            if token >= n_vocab:
                raise InvalidRequestError(
                    f"logit_bias: token id {token} is out of range (0–{n_vocab - 1}).", "logit_bias"
                )
        adapters = self._adapters(request.lora)
        choices = request.choices()
        with self._reading(), self._preparing(c.request_id for c in choices) as check_wanted:
            prompt = self._prompt(request)
            room = self._description.n_ctx - len(prompt.tokens)
            wanted = request.sampling.max_tokens
            shifts = self._context_shift and not prompt.media
            max_tokens = room if wanted is None else wanted if shifts else min(wanted, room)
            check_wanted()
            made = [self._request(choice, prompt, max_tokens, adapters) for choice in choices]
            check_wanted()
            self._check_open()
            self._engine.submit(*made)
        return [Stream(r.channel) for r in made]

    def _request(
        self,
        request: GenerationRequest,
        prompt: Prompt,
        max_tokens: int,
        adapters: tuple[tuple[str, float], ...],
    ) -> Request:
        """The engine's form of a request. Slow parts are done here: its thread serves everyone."""
        params, begun = request.sampling, request.resume
        done = begun.tokens if begun is not None else ()
        piece = self._piece_with_marks if request.show_marks else self._vocab.piece
        made = Request(
            prompt.tokens,
            params,
            max_tokens,
            Detokenizer(piece, params.stop)
            if begun is None
            else ResumedDetokenizer(piece, params.stop, begun.sent_chars),
            Channel(request.request_id, self.abort),
            priority=request.priority,
            caller=request.caller,
            weight=request.weight,
            cache_salt=self._salt(request),
            keep_on_disk=request.keep_on_disk,
            adapters=adapters,
            show_tokens=request.show_tokens,
            media=prompt.media,
        )
        if begun is not None:
            resume(
                made,
                begun,
                is_end=self._vocab.is_end,
                n_vocab=self._description.n_vocab,
                n_ctx=self._description.n_ctx,
                context_shift=self._context_shift and not prompt.media,
            )
        constraint = (
            None
            if params.grammar is None
            else self._grammars.compile(params.grammar, request.caller, done)
        )
        made.constraint = constraint
        made.sampler = self._runner.sampler(params, made.tokens, constraint, len(done))
        return made

    def _piece_with_marks(self, token: int) -> bytes:
        return self._marks.get(token) or self._vocab.piece(token)

    def _adapters(
        self, wanted: tuple[tuple[str, float], ...] | None
    ) -> tuple[tuple[str, float], ...]:
        if wanted is None:
            return self._lora
        known = [name for name, _ in self._lora]
        for name, _ in wanted:
            if name not in known:
                raise InvalidRequestError(
                    f"there is no adapter {name!r}; loaded with the model: "
                    f"{', '.join(known) or 'none'}.",
                    "lora",
                )
        return tuple(sorted((name, scale) for name, scale in wanted if scale))

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        raise InvalidRequestError(
            f"{self._description.name!r} generates text; "
            'load an embedding model (such as "minilm") for vectors.',
            "model",
        )

    def inquire(self, inquiry: Inquiry[Answer]) -> Future[Answer]:
        future: Future[Any] = Future()
        match inquiry.question:
            case ListSteps():
                self._check_open()
                future.set_result(self._engine.steps())
            case ListSlots():
                self._check_open()
                future.set_result(self._engine.slots())
            case ListRequests():
                self._check_open()
                future.set_result(self._engine.requests())
            case question:
                with self._reading():
                    salt = f"{inquiry.caller}\0" if inquiry.caller else ""
                    future.set_result(
                        answer(question, self._vocab, self._template, self._reader, salt)
                    )
        return future

    def abort(self, request_id: str) -> None:
        self._preparing.abort(request_id)
        if not self.closed:
            self._engine.abort(request_id)

    def stats(self) -> EngineStats:
        return self._engine.stats

    def _free(self) -> bool:
        """False: something is still being encoded, after which the rest is freed."""
        if self._media is None:
            self._free_models()
        return self._media is None or self._media.close(self._free_models)

    def _free_models(self) -> None:
        for model, runner in [(self._model, self._runner), *([self._draft] if self._draft else [])]:
            runner.close()
            model.close()

    def _check_open(self) -> None:
        self._life.check(self._description.name, self._engine.failure)
        if self._engine.closed:
            raise ModelUnloadedError.of(self._description.name)

    def close(self) -> None:
        if not self._life.is_ours:
            return
        with self._close_lock:
            if self._life.closed:
                return
            self._life.closed = True
            running.discard(self)
            switching.relax()
        self._reading.ended()
        if self._engine.close() and self._reading.ended(0):
            self._grammars.close()
            if self._free():
                return
            why = "an image is still being encoded; the memory is freed when that is done"
        else:
            why = "the engine did not stop in time, so its memory was not freed"
        warnings.warn(why, ResourceWarning, stacklevel=2)
