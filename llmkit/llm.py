"""`LLM`, the handle of a loaded model: generate, chat, stream, profile, monitor, serve.

What it shares with other handles is in `llmkit.handle`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, overload

from llmkit.errors import InvalidRequestError
from llmkit.handle import Handle
from llmkit.protocol import Completion, EmbeddingRequest, Embeddings
from llmkit.protocol.client import EngineClient
from llmkit.protocol.inquiries import Detokenize, ListSlots, ListSteps, Tokenize
from llmkit.protocol.stream import Stream
from llmkit.sessions.answers import Answers
from llmkit.sessions.messages import Messages, as_messages
from llmkit.sessions.running import Interrupted, ask, make_request
from llmkit.settings.options import EngineOptions

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import pandas as pd

    from llmkit.bench.profiler import Profile
    from llmkit.bridge.server import BridgeServer
    from llmkit.notebook.display import Tokens
    from llmkit.notebook.monitor import Monitor
    from llmkit.notebook.panel import ChatPanel
    from llmkit.notebook.timeline import KVMap, Timeline
    from llmkit.sessions.session import Session

__all__ = ["LLM", "Interrupted"]


class LLM(Handle):
    """A loaded model.

    >>> llm = llmkit.load("smollm2")                       # doctest: +SKIP
    >>> llm.generate("Once upon a time", max_tokens=20)    # doctest: +SKIP
    >>> for piece in llm.stream("Once"): print(piece)      # doctest: +SKIP

    Sampling parameters are keywords everywhere; see `SamplingParams`. So are ``priority``,
    ``caller``, ``cache_salt`` and ``lora`` of `GenerationRequest`. ``unload()`` frees the memory
    even if references to the handle remain (in ``Out[]``); later calls raise `ModelUnloadedError`.
    The stop button raises KeyboardInterrupt, and ``last`` has the text so far.
    """

    def __init__(
        self,
        client: EngineClient,
        bridge: BridgeServer | None = None,
        options: EngineOptions | None = None,
        on_unload: Callable[[LLM], None] = lambda _: None,
    ) -> None:
        super().__init__(client, bridge, options, on_unload)
        self._answers = Answers(lambda: self.engine, client.description, self._num_tokens)
        self._runs = self._answers.runs
        self._monitors: list[Monitor] = []

    def __repr__(self) -> str:
        d = self._description
        client = self._client
        if client is not None and client.state.is_gone:
            return f"LLM({d.name!r}, gone: {client.state.reason})"
        if client is None:
            return f"LLM({d.name!r}, unloaded)"
        return (
            f"LLM({d.name!r}, {d.quantization}, {d.n_params / 1e6:.0f}M parameters, "
            f"n_ctx={d.n_ctx}, n_slots={d.n_slots}, {', '.join(d.gpu_bytes) or d.device})"
        )

    @overload
    def generate(self, prompt: str, **sampling: Any) -> Completion: ...
    @overload
    def generate(self, prompt: Sequence[str], **sampling: Any) -> list[Completion]: ...
    def generate(
        self, prompt: str | Sequence[str], **sampling: Any
    ) -> Completion | list[Completion]:
        """Continue a text, or a list of texts in one batch. Blocks; ■ stops it.

        ``sampling`` are the fields of `SamplingParams`; also ``json_schema`` (a dict or a pydantic
        model), ``regex`` or ``choice`` (a list of texts) to constrain the text, and ``priority``,
        ``cache_salt``, ``lora``, ``suffix`` of the request. Control tokens spelled out in the
        prompt (``<|im_start|>``) are parsed as such; ``parse_special=False`` takes them as text.
        """
        if isinstance(prompt, str):
            return self._runs.complete([make_request(sampling, prompt=prompt)])[0]
        return self._answers.batch(list(prompt), sampling)

    def stream(self, prompt: str, **sampling: Any) -> Stream:
        """Continue a text piece by piece.

        ``for piece in …``, ``async for piece in …``, or ``await …`` for the completion.
        """
        if not isinstance(prompt, str):
            raise InvalidRequestError(
                f"prompt must be a str, not {type(prompt).__name__}; generate() takes a list.",
                "prompt",
            )
        return self._runs.submit(make_request(sampling, prompt=prompt))

    def chat(
        self,
        messages: Messages,
        *,
        images: Any = (),
        sounds: Any = (),
        stream: bool = False,
        tools: Sequence[Callable[..., Any]] = (),
        tool_choice: str = "auto",
        max_rounds: int = 8,
        **sampling: Any,
    ) -> Any:
        """Answer a message or a list of messages (`Message`, or dicts with role and content).

        Returns a `Completion`, or with ``stream=True`` a `Stream`. ``images`` go with the last
        message of the user, to models that see: PIL images, paths, the bytes of files, arrays of
        shape (height, width, 3), matplotlib figures, one or a list. So do ``sounds``: paths, the
        bytes of files, or samples with their rate, (array, 16000). A dict's parts may be OpenAI's
        ``image_url`` (``data:``) and ``input_audio``. ``tools`` are Python functions
        that the model may call: described by their type hints and docstrings, called with checked
        arguments, their results given to the model, until it answers or after ``max_rounds``.
        ``tool_choice="required"`` (or a function's name) makes the first answer a call. Reasoning
        is in the completion's ``reasoning``; a stream has it in its text.
        ``continue_final_message=True`` continues a final assistant message.
        """
        return self._answers.chat(
            messages, stream, tools, tool_choice, max_rounds, sampling, images, sounds
        )

    @property
    def last(self) -> Completion | None:
        """The latest completion; after an interrupt a partial one (``finish_reason`` "abort")."""
        return self._runs.last

    @property
    def last_batch(self) -> list[Completion]:
        """The completions of the latest call with a list of prompts, in order.

        After an interrupt also the partial ones, as far as it got.
        """
        return self._runs.last_batch

    def session(
        self,
        system: str | None = None,
        *,
        path: str | Path | None = None,
        id: str | None = None,
        **sampling: Any,
    ) -> Session:
        """A conversation over several turns: say, stream, fork, undo, trim, save.

        ``path`` is a saved session. ``id`` is a conversation of the database that gateways have
        too, by its id or its name; a new name begins one. ``sampling`` applies to all its answers.
        """
        return self._answers.session(system, path, id, sampling)

    def _num_tokens(self, text: str) -> int:
        return 0 if self.closed else len(self.tokenize(text))

    def chat_panel(
        self, system: str | None = None, *, session: Session | None = None, **sampling: Any
    ) -> ChatPanel:
        """A chat in widgets that does not block the notebook: streaming, stop, edit and resend.

        ``session`` is a conversation to continue.
        """
        from llmkit.notebook.panel import ChatPanel

        sees = "image" in self._description.inputs
        return ChatPanel(session or self.session(system, **sampling), self.name, sees=sees)

    def map(
        self,
        frame: Any,
        template: str | Callable[[Any], Any],
        *,
        into: str = "answer",
        chat: bool = True,
        **sampling: Any,
    ) -> pd.DataFrame:
        """One prompt per table row, batched: ``llm.map(df, "Translate into French: {text}")``.

        ``template`` names columns in braces, or is a function from a row to a prompt (or messages).
        Returns a copy with the answers in the column ``into`` and the errors in
        ``into + "_error"``: a failed row does not stop the others. ``chat=False`` continues the
        text instead of answering it. ■ stops it; the answers so far are in ``llm.last_batch``.
        """
        from llmkit.notebook.frames import map_table

        return map_table(self._answers, frame, template, into, chat, sampling)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with the initial token (BOS) if the model wants one."""
        return list(ask(self.engine, Tokenize(text, parse_special=False)).tokens)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids, with control tokens spelled out."""
        return ask(self.engine, Detokenize(tuple(int(t) for t in tokens)))

    @overload
    def embed(self, texts: str | Sequence[str], *, normalize: bool = True) -> np.ndarray: ...
    @overload
    def embed(self, texts: pd.Series, *, normalize: bool = True) -> pd.DataFrame: ...
    def embed(self, texts: Any, *, normalize: bool = True) -> np.ndarray | pd.DataFrame:
        """Embeddings of texts by an embedding model (``llmkit.load("minilm")``).

        float32 of shape (n, size), or (size,) for a single text; for a table's column (a pandas
        Series), a DataFrame with the column's index.

        ``normalize`` scales them to length 1, so that ``a @ b`` is the cosine similarity. Blocks; ■
        stops it. Texts of this call and of other callers are computed together.
        """
        from llmkit.notebook import arrays

        size = self._description.embedding_size
        return arrays.vectors(self._ask_vectors, texts, size, normalize)

    def rerank(
        self, query: str, documents: Sequence[str], top: int | None = None
    ) -> list[tuple[int, float]]:
        """Indices and scores of the documents that fit the query best, best first; at most ``top``.

        A cross-encoder (a reranker) scores each pair: unbounded, higher is better. An embedding
        model gives the cosine similarity.
        """
        from llmkit.notebook import arrays

        ranks = self._description.ranks
        return arrays.rank(self._ask_vectors, query, documents, top, ranks=ranks)

    def _ask_vectors(self, request: EmbeddingRequest) -> Embeddings:
        engine = self.engine
        try:
            return engine.embed(request).result()
        except KeyboardInterrupt:
            engine.abort(request.request_id)
            raise Interrupted("stopped; there are no vectors") from None

    def save_prefix(self, prompt: str | Messages) -> int:
        """Compute a text, or the beginning of a conversation, and save it in ``prefix_dir``.

        Requests that begin with it reuse it, in later processes too. Returns its length in tokens.
        """
        if self._options.prefix_dir is None:
            raise InvalidRequestError(
                "this model was loaded without a folder for prefixes; load it with prefix_dir=...",
                "prefix_dir",
            )
        if isinstance(prompt, str):
            return self._answers.save_prefix(prompt=prompt)
        return self._answers.save_prefix(messages=as_messages(prompt))

    def profile(self, **options: Any) -> Profile:
        """Measure prefill and decode speed by prompt length and batch size.

        ``.df`` is a table, ``.plot()`` a chart; options: `llmkit.bench.profiler.run`.
        """
        from llmkit.bench import profiler

        return profiler.run(self.engine, **options)

    def monitor(self, interval: float = 0.5) -> Monitor:
        """A live panel of memory, throughput, queue and KV use, updated even while cells are busy.

        Ends with ``unload()``.
        """
        from llmkit.notebook.monitor import watch

        monitor = watch(self.engine, interval)
        self._monitors = [m for m in self._monitors if m.running] + [monitor]
        return monitor

    def timeline(self, seconds: float | None = None) -> Timeline:
        """The engine's last steps (at most 2,000, or those of the last ``seconds``).

        Shows, slot by slot, what was decoded and which prompts were computed.
        """
        from llmkit.notebook.timeline import Timeline

        return Timeline(self.name, ask(self.engine, ListSteps()), seconds)

    def kv_map(self) -> KVMap:
        """The current contents of the engine's slots, and the prefixes that they share."""
        from llmkit.notebook.timeline import KVMap

        return KVMap(self.name, ask(self.engine, ListSlots()), self._description.n_ctx)

    def show_tokens(self, completion: Completion) -> Tokens:
        """The tokens of a completion made with ``logprobs=k``, coloured by their probability."""
        from llmkit.notebook.display import Tokens

        return Tokens(completion)

    def perplexity(self, text: str, *, n_ctx: int | None = None) -> float:
        """Perplexity of a text: exp of its mean negative log-probability; lower is better.

        The text is scored in windows of ``n_ctx`` tokens (at most the context); after the first
        window, each token has at least half a window before it.
        """
        from llmkit.bench import quality

        return quality.perplexity(self.engine, self.tokenize(text), n_ctx)

    def _close(self, client: EngineClient) -> None:
        for monitor in self._monitors:
            monitor.stop()
        self._answers.close()
        super()._close(client)
