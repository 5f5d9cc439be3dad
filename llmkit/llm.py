"""`LLM`, the handle people hold: generate, chat, stream, profile, monitor, serve. It composes the rooms below it and owns no memory itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

from llmkit.client import EngineClient
from llmkit.errors import InvalidRequestError, ModelUnloadedError
from llmkit.options import EngineOptions
from llmkit.running import BATCH_WINDOW, SHAPES, Interrupted, Runs, make_request, new_id
from llmkit.session import Messages, as_messages
from llmkit.stream import Stream
from llmkit.types import (
    Completion,
    EmbeddingRequest,
    Embeddings,
    EngineStats,
    GenerationRequest,
    Inquiry,
    InquiryKind,
    Message,
    ModelDescription,
    SamplingParams,
)
from llmkit.waiting import uninterrupted

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import pandas as pd

    from llmkit.bench.profiler import Profile
    from llmkit.bridge.server import BridgeServer
    from llmkit.chat.reading import AnswerReader
    from llmkit.notebook.display import Tokens
    from llmkit.notebook.monitor import Monitor
    from llmkit.notebook.panel import ChatPanel
    from llmkit.notebook.serving import Endpoint
    from llmkit.notebook.timeline import KVMap, Timeline
    from llmkit.session import Session

__all__ = ["LLM", "Interrupted"]


class LLM:
    """A loaded model.

    >>> llm = llmkit.load("smollm2")                       # doctest: +SKIP
    >>> llm.generate("Once upon a time", max_tokens=20)    # doctest: +SKIP
    >>> for piece in llm.stream("Once"): print(piece)      # doctest: +SKIP

    Sampling parameters are keywords everywhere; see `SamplingParams`. So are ``priority``, ``caller``, ``cache_salt`` and ``lora`` of `GenerationRequest`.
    References to it that live on (``Out[]``) do not keep the model's memory after ``unload()``; later calls then raise `ModelUnloadedError`.
    The stop button raises KeyboardInterrupt, and ``last`` has the text so far.
    """

    def __init__(
        self, client: EngineClient, bridge: BridgeServer | None = None, options: EngineOptions | None = None, on_unload: Callable[[LLM], None] = lambda _: None
    ) -> None:
        self._on_unload = on_unload
        self._unload_lock = threading.Lock()
        self._client: EngineClient | None = client
        self._description = client.description
        self._bridge = bridge
        self._options = options or EngineOptions()
        self._runs = Runs(lambda: self.engine, lambda done, held: self._reader(held).apart(done, self._num_tokens))
        self._endpoint: Endpoint | None = None
        self._monitors: list[Monitor] = []

    def check_same(self, options: EngineOptions, name: str | None, given: Collection[str] | None = None, share: bool | None = None) -> None:
        """Raises `InvalidRequestError` where a second load asks for something else; of the options, those that were ``given`` count (None: all)."""
        mine = self._options.as_dict()
        other = {k: v for k, v in options.as_dict().items() if v != mine[k] and (given is None or k in given)}
        if name is not None and name != self._description.name:
            other["name"] = name
        if share is False and self._bridge is not None:
            other["share"] = False
        if other:
            asked = ", ".join(f"{k}={v!r}" for k, v in other.items())
            raise InvalidRequestError(
                f"{self._description.name!r} is loaded in this process with other settings than {asked}; unload() it first to change them."
            )

    def share(self, kernel_id: str | None) -> None:
        """Let other processes of this user reach a model that was loaded without."""
        if self._bridge is None and not self._options.isolated:
            from llmkit.bridge.server import BridgeServer

            self._bridge = BridgeServer(self.engine, kernel_id)

    @property
    def model(self) -> ModelDescription:
        """Name, sizes and limits."""
        return self._description

    @property
    def name(self) -> str:
        return self._description.name

    @property
    def closed(self) -> bool:
        return self._client is None or self._client.gone is not None

    @property
    def stats(self) -> EngineStats:
        """The engine's newest counters."""
        return self.engine.stats()

    @property
    def engine(self) -> EngineClient:
        """What computes, here or in another process."""
        if self._client is None:
            raise ModelUnloadedError(f"the model {self.name!r} was unloaded; load it again with llmkit.load().")
        return self._client

    def __repr__(self) -> str:
        d = self._description
        if self._client is not None and self._client.gone is not None:
            return f"LLM({d.name!r}, gone: {self._client.gone})"
        if self.closed:
            return f"LLM({d.name!r}, unloaded)"
        return f"LLM({d.name!r}, {d.quantization}, {d.n_params / 1e6:.0f}M parameters, n_ctx={d.n_ctx}, n_slots={d.n_slots}, {d.device})"

    @overload
    def generate(self, prompt: str, **sampling: Any) -> Completion: ...
    @overload
    def generate(self, prompt: Sequence[str], **sampling: Any) -> list[Completion]: ...
    def generate(self, prompt: str | Sequence[str], **sampling: Any) -> Completion | list[Completion]:
        """Continue a text; with a list of texts, all of them at once in one batch. Blocks; ■ stops it.

        ``sampling`` are the fields of `SamplingParams`; also ``json_schema`` (a dict, or a pydantic model), ``regex`` or ``choice`` (a list of texts), which
        the text will match, and ``priority``, ``cache_salt``, ``lora``, ``suffix`` of the request. Control tokens that the prompt spells out (``<|im_start|>``)
        are read as such; ``parse_special=False`` takes them for text.
        """
        if isinstance(prompt, str):
            return self._runs.complete([make_request(sampling, prompt=prompt)])[0]
        prompts = list(prompt)
        for i, text in enumerate(prompts):
            if not isinstance(text, str):
                raise InvalidRequestError(f"prompt {i} is not text but {type(text).__name__}.", "prompt")
        first = make_request(sampling, prompt="")
        return self._runs.complete(replace(first, request_id=new_id(), prompt=text) for text in prompts)

    def stream(self, prompt: str, **sampling: Any) -> Stream:
        """Continue a text piece by piece: ``for piece in …``, ``async for piece in …`` or ``await …`` for the completion."""
        if not isinstance(prompt, str):
            raise InvalidRequestError(f"prompt must be a text, not {type(prompt).__name__}; generate() takes a list.", "prompt")
        return self._runs.submit(make_request(sampling, prompt=prompt))

    def chat(
        self,
        messages: Messages,
        *,
        stream: bool = False,
        tools: Sequence[Callable[..., Any]] = (),
        tool_choice: str = "auto",
        max_rounds: int = 8,
        **sampling: Any,
    ) -> Any:
        """Answer a message, or a conversation as a list of messages (dicts with ``role`` and ``content``, or `Message`).

        A `Completion`, or with ``stream=True`` a `Stream`. ``tools`` are Python functions that the model may call: they are described by their type hints and
        docstrings, called with checked arguments, and what they return is told to the model, until it answers or ``max_rounds`` are over.
        ``tool_choice="required"`` (or a function's name) makes the first answer a call. What a model that reasons wrote for itself is in the completion's
        ``reasoning``; a stream has it in its text. ``continue_final_message=True`` goes on with a last message of the assistant.
        """
        if tools:
            if any(sampling.get(name) is not None for name in ("grammar", *SHAPES)):
                raise InvalidRequestError("tools cannot be combined with a grammar, json_schema, regex or choice.", "tools")
            if stream:
                raise InvalidRequestError("a chat with tools cannot be streamed here; leave stream out, or use an endpoint of llm.serve().", "stream")
            from llmkit.toolbox import converse

            def ask(messages: list[Message], **asked: Any) -> Completion:
                more = {name: asked.pop(name) for name in ("tools", "show_marks")}
                return self._runs.complete([replace(make_request({**sampling, **asked}, messages=tuple(messages)), **more)])[0]

            return converse(ask, self._description, tools, list(as_messages(messages)), tool_choice, max_rounds)
        request = make_request(sampling, messages=as_messages(messages))
        if stream:
            return self._runs.submit(request)
        if not self._description.reasoning:
            return self._runs.complete([request])[0]
        done = self._runs.complete([replace(request, show_marks=True)])[0]
        return self._reader(request.sampling.grammar is not None, request).apart(done, self._num_tokens)

    @property
    def last(self) -> Completion | None:
        """The newest completion, also a partial one after an interrupt (``finish_reason`` "abort")."""
        return self._runs.last

    @property
    def last_batch(self) -> list[Completion]:
        """The completions of the newest call with a list of prompts, in their order; after an interrupt also the partial ones, as far as it came."""
        return self._runs.last_batch

    def session(self, system: str | None = None, *, path: str | Path | None = None, **sampling: Any) -> Session:
        """A conversation that goes on: say, stream, fork, undo, trim, save. ``path`` is a saved session, ``sampling`` is for all its answers."""
        from llmkit.session import Session

        return Session.open(self._say, self._count, self._reader, self._description.n_ctx, system, path, sampling)

    def _say(self, messages: Sequence[Message], options: dict[str, Any]) -> Stream:
        return self._runs.submit(replace(make_request(options, messages=tuple(messages)), show_marks=bool(self._description.reasoning)))

    def _reader(self, held: bool, request: GenerationRequest | None = None) -> AnswerReader:
        from llmkit.chat.reading import AnswerReader

        if not self._description.reasoning:
            return AnswerReader.plain()
        last = request.messages[-1] if request is not None and request.messages else None
        continued = last.content if last is not None and request is not None and request.continue_final else None
        return AnswerReader(self._description, held=held, continued=continued, after_results=last is not None and last.role == "tool")

    def _num_tokens(self, text: str) -> int:
        return 0 if self.closed else len(self.tokenize(text))

    def _count(self, messages: Sequence[Message]) -> int:
        return len(self._inquire("tokenize_chat", messages=[m.as_dict() for m in messages])["tokens"])

    def chat_panel(self, system: str | None = None, *, session: Session | None = None, **sampling: Any) -> ChatPanel:
        """A chat in widgets that does not block the notebook: streaming, with stop, and edit and resend. ``session`` goes on with a conversation."""
        from llmkit.notebook.panel import ChatPanel

        return ChatPanel(session or self.session(system, **sampling), self.name)

    def map(self, frame: Any, template: str | Callable[[Any], Any], *, into: str = "answer", chat: bool = True, **sampling: Any) -> pd.DataFrame:
        """One prompt for each row of a table, computed in batches: ``llm.map(df, "Translate into French: {text}")``.

        ``template`` names columns in braces, or is a function from a row to a prompt (or messages). Returns a copy with the answers in the column ``into`` and
        what went wrong in ``into + "_error"``: one bad row stops nothing. ``chat=False`` continues the text instead of answering it. ■ stops it; what was
        made so far is in ``llm.last_batch``.
        """
        from llmkit.notebook.frames import map_rows

        def submit(prompt: Any) -> Stream:
            about: dict[str, Any] = {"messages": as_messages(prompt)} if chat or not isinstance(prompt, str) else {"prompt": prompt}
            request = make_request(sampling, **about)
            return self._runs.submit(replace(request, show_marks=request.messages is not None and bool(self._description.reasoning)))

        held = any(sampling.get(name) is not None for name in ("grammar", *SHAPES))
        made: list[Completion] = []
        running: list[Stream] = []
        try:
            return map_rows(frame, template, submit, lambda c: self._reader(held).apart(c).text if chat else c.text, into, BATCH_WINDOW, made, running)
        except KeyboardInterrupt:
            raise Interrupted("stopped; what was made so far is in llm.last_batch") from None
        finally:
            self._runs.keep_completions(made, running)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with what the model wants at its beginning."""
        return list(self._inquire("tokenize", text=text, parse_special=False)["tokens"])

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids, control tokens spelled out."""
        return str(self._inquire("detokenize", tokens=[int(t) for t in tokens])["text"])

    def _inquire(self, kind: InquiryKind, **data: Any) -> dict[str, Any]:
        return self.engine.inquire(Inquiry(new_id(), kind, data)).result()

    @overload
    def embed(self, texts: str | Sequence[str], *, normalize: bool = True) -> np.ndarray: ...
    @overload
    def embed(self, texts: pd.Series, *, normalize: bool = True) -> pd.DataFrame: ...
    def embed(self, texts: Any, *, normalize: bool = True) -> np.ndarray | pd.DataFrame:
        """Vectors of texts by an embedding model (``llmkit.load("minilm")``): float32 of shape (n, size), or (size,) for a single text. For a table's column
        (a pandas Series), a DataFrame with the column's index.

        ``normalize`` makes their length 1, so that ``a @ b`` is the cosine similarity. Blocks; texts of one call and of other callers are computed together.
        """
        from llmkit import vectors

        single = isinstance(texts, str)
        if hasattr(texts, "index") and hasattr(texts, "to_frame"):
            return vectors.embed_column(self._ask_vectors, new_id, texts, self._description.embedding_size, normalize)
        found = vectors.embed(self._ask_vectors, new_id, [texts] if isinstance(texts, str) else texts, self._description.embedding_size, normalize)
        return found[0] if single else found

    def rerank(self, query: str, documents: Sequence[str], top: int | None = None) -> list[tuple[int, float]]:
        """The places of the documents that fit the query best, with their scores, best first; at most ``top`` of them.

        A cross-encoder (a model that ranks) judges each pair: any number, higher is better. An embedding model gives the cosine similarity.
        """
        from llmkit import vectors

        return vectors.rank(self._ask_vectors, new_id, query, documents, top, ranks=self._description.ranks)

    def _ask_vectors(self, request: EmbeddingRequest) -> Embeddings:
        return self.engine.embed(request).result()

    def save_prefix(self, prompt: str | Messages) -> int:
        """Compute a text, or the beginning of a conversation, and keep it in the folder ``prefix_dir``: requests that begin with it find it computed, also in
        later processes. Returns its length in tokens."""
        if self._options.prefix_dir is None:
            raise InvalidRequestError("this model was loaded without a place for prefixes; load it with prefix_dir=... to keep them.", "prefix_dir")
        request: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"messages": as_messages(prompt)}
        sampling = SamplingParams(max_tokens=0)
        return self._runs.complete([GenerationRequest(new_id(), sampling, keep_on_disk=True, **request)])[0].usage.prompt_tokens

    def profile(self, **options: Any) -> Profile:
        """Measure prefill and decode speed by prompt length and batch size. ``.df`` is a table, ``.plot()`` a picture; options: `llmkit.bench.profiler.run`."""
        from llmkit.bench import profiler

        return profiler.run(self.engine, **options)

    def monitor(self, interval: float = 0.5) -> Monitor:
        """A live panel of memory, throughput, queue and KV use, moving also while cells are busy. Ends with ``unload()``."""
        from llmkit.notebook.monitor import Monitor

        connection = getattr(self.engine, "connection", None)
        options: dict[str, Any] = {"pid": connection.pid} if connection is not None else {}
        if connection is None:  # elsewhere the model takes nothing here, and to ask llama.cpp for the devices would take some of each
            from llmkit.assembly import device_memory

            options["device_memory"] = device_memory
        monitor = Monitor(self.engine, interval=interval, **options)
        self._monitors = [m for m in self._monitors if m.running] + [monitor]
        return monitor

    def timeline(self, seconds: float | None = None) -> Timeline:
        """The last steps of the engine (at most 2,000, or of the last ``seconds``): what was decoded, which prompts were computed, slot by slot."""
        from llmkit.notebook.timeline import Timeline

        return Timeline(self.name, self._inquire("steps")["steps"], seconds)

    def kv_map(self) -> KVMap:
        """What the engine's slots hold now, and what they have in common."""
        from llmkit.notebook.timeline import KVMap

        return KVMap(self.name, self._inquire("slots")["slots"], self._description.n_ctx)

    def show_tokens(self, completion: Completion) -> Tokens:
        """A completion that was made with ``logprobs=k``, its tokens coloured by their probability."""
        from llmkit.notebook.display import Tokens

        return Tokens(completion)

    def perplexity(self, text: str, *, n_ctx: int | None = None) -> float:
        """How surprised the model is by a text: e to the mean negative log-probability of its tokens, lower is better. The text is read in windows of ``n_ctx``
        tokens (at most the context), each token with at least half a window before it."""
        from llmkit.bench import quality

        return quality.perplexity(self.engine, self.tokenize(text), n_ctx)

    def serve(self, port: int = 0) -> Endpoint:
        """Where other programs reach this model: the Jupyter server's gateway, or a loopback gateway of its own (on ``port``; 0 takes a free one) where no
        Jupyter server owns this kernel. Shows the URL and how to use it, never the secret.
        """
        from llmkit.notebook import serving

        engine = self.engine
        connection = self._bridge.connection if self._bridge is not None else getattr(engine, "connection", None)
        if connection is None or not connection.path.exists():
            raise InvalidRequestError("this model was loaded with share=False; load it with share=True to serve it.", "share")
        if self._endpoint is not None and port not in (0, self._endpoint.port):
            self._endpoint.close()
            self._endpoint = None
        if self._endpoint is None or not self._endpoint.alive:
            self._endpoint = serving.find_or_start(engine.description, connection.kernel_id, port, connection.pid)
        return self._endpoint

    def unload(self) -> None:
        """Give the memory back. Running requests end with `ModelUnloadedError`; a second call does nothing."""
        with self._unload_lock:
            client, self._client = self._client, None
        if client is None:
            return
        try:
            self._on_unload(self)
        finally:
            uninterrupted(lambda: self._close(client))

    def _close(self, client: EngineClient) -> None:
        for monitor in self._monitors:
            monitor.stop()
        if self._endpoint is not None:
            self._endpoint.close()
        if self._bridge is not None:
            self._bridge.close()
        client.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.unload()
