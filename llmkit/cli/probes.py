"""The checks of `llmkit smoke`: one request or a few each, as a client would send them."""

from __future__ import annotations

import base64
import json
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from llmkit.cli.endpoint import Endpoint, EndpointError, Reply, checked, events_of
from llmkit.cli.findings import Finding

__all__ = ["NotHereError", "Probes"]

QUESTION = [{"role": "user", "content": "Say hello."}]
SHORT = {"max_tokens": 8, "temperature": 0}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"color": {"type": "string", "enum": ["red", "green"]}},
    "required": ["color"],
    "additionalProperties": False,
}
STALE_S, SEEN_S, GONE_S = 0.7, 3.0, 10.0
MISSING = (404, 405, 501)


class NotHereError(Exception):
    """The deployment does not offer this, and need not."""


class FailedError(Exception):
    """It does, but wrongly."""


def expect(condition: object, text: str) -> None:
    if not condition:
        raise FailedError(text)


class Probes:
    """Checks an endpoint. ``model`` empty: the first that chats."""

    def __init__(self, endpoint: Endpoint, model: str, timeout_s: float) -> None:
        self._endpoint, self._wanted, self._timeout = endpoint, model, timeout_s
        self._names: list[str] = []
        self._model: str | None = None
        self._is_ours = False

    def run(self) -> Iterator[Finding]:
        """Each check as it ends; only the first ones if nobody answers."""
        checks: tuple[tuple[str, Callable[[], str]], ...] = (
            ("health", self._health),
            ("models", self._models),
            ("chat", self._chat),
            ("chat, streamed", self._chat_streamed),
            ("completions", self._completions),
            ("embeddings", self._embeddings),
            ("tools", self._tools),
            ("JSON schema", self._schema),
            ("responses", self._responses),
            ("Anthropic", self._anthropic),
            ("Ollama", self._ollama),
            ("cancel", self._cancel),
            ("errors", self._errors),
            ("key", self._key),
            ("metrics", self._metrics),
            ("docs", self._docs),
        )
        for name, check in checks:
            began = time.monotonic()
            try:
                level, text = "ok", check()
            except NotHereError as error:
                level, text = "none", f"not here: {error}"
            except (FailedError, EndpointError) as error:
                level, text = "bad", str(error)
            except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
                level, text = "bad", f"the reply has another form: {error!r:.100}"
            yield Finding(name, level, text, seconds=time.monotonic() - began)  # type: ignore[arg-type]
            if level == "bad" and text.startswith("nothing answers"):
                return

    def _call(self, method: str, path: str, body: Any = None, *, at_root: bool = False) -> Reply:
        return self._endpoint.call(method, path, body, at_root=at_root, timeout_s=self._timeout)

    def _ask(self, path: str, body: Any, *, at_root: bool = False) -> Any:
        """The reply to a POST; `NotHereError` where there is no such route."""
        reply = self._call("POST", path, body, at_root=at_root)
        if reply.status in MISSING and not _is_about_model(reply):
            raise NotHereError(f"{path} answers with status {reply.status}")
        return checked(reply).json()

    @property
    def model(self) -> str:
        if self._model is None:
            raise NotHereError("it needs a model that chats")
        return self._model

    def _health(self) -> str:
        reply = self._call("GET", "/health", at_root=True)
        if reply.status in MISSING:
            raise NotHereError(f"/health answers with status {reply.status}")
        checked(reply)
        also = []
        for path in ("/health/live", "/health/ready", "/readiness"):
            status = self._call("GET", path, at_root=True).status
            expect(status == 200 or status in MISSING, f"{path} answers with status {status}")
            also += [path] if status == 200 else []
        return ", ".join(["ready", *also])

    def _models(self) -> str:
        listed = checked(self._call("GET", "/models")).json()
        expect(listed["object"] == "list", 'the list is no object "list"')
        self._names = [str(model["id"]) for model in listed["data"]]
        self._is_ours = any(model.get("owned_by") == "llmkit" for model in listed["data"])
        expect(self._names, "no model is listed")
        one = self._call("GET", f"/models/{self._names[0]}")
        if one.status not in MISSING or self._is_ours:
            expect(checked(one).json()["id"] == self._names[0], "a model has another id alone")
        return ", ".join(self._names)[:200]

    def _chat(self) -> str:
        names = [self._wanted] if self._wanted else self._names
        refusal = "no model is listed"
        for name in names:
            body = {"model": name, "messages": QUESTION, **SHORT}
            reply = self._call("POST", "/chat/completions", body)
            if reply.status == 400 and len(names) > 1:  # it makes vectors, say
                refusal = reply.body[:200].decode(errors="replace")
                continue
            answer = checked(reply).json()
            self._model = name
            choice = answer["choices"][0]
            expect(answer["object"] == "chat.completion", "the answer is no chat.completion")
            expect(isinstance(choice["message"]["content"], str), "the answer has no text")
            expect(choice["finish_reason"] in ("stop", "length"), "it does not say why it ended")
            usage = answer["usage"]
            total = usage["prompt_tokens"] + usage["completion_tokens"]
            expect(usage["total_tokens"] == total, "the usage does not add up")
            expect(0 < usage["completion_tokens"] <= 8, "max_tokens is not obeyed")
            return f"{name}: {usage['completion_tokens']} tokens"
        raise FailedError(f"no model chats: {refusal}")

    def _chat_streamed(self) -> str:
        body = {
            "model": self.model,
            "messages": QUESTION,
            "stream": True,
            "stream_options": {"include_usage": True},
            **SHORT,
        }
        began, first = time.monotonic(), None
        chunks = []
        with self._endpoint.open(
            "POST", "/chat/completions", body, timeout_s=self._timeout
        ) as response:
            for chunk in events_of(response):
                chunks.append(chunk)
                if first is None and chunk["choices"] and chunk["choices"][0]["delta"]:
                    first = time.monotonic() - began
        expect(chunks, "no event came")
        expect(len({chunk["id"] for chunk in chunks}) == 1, "the events have several ids")
        said = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        expect(said[0]["delta"].get("role") == "assistant", "the first event has no role")
        expect(said[-1]["finish_reason"] in ("stop", "length"), "it does not say why it ended")
        usages = [chunk for chunk in chunks if chunk.get("usage")]
        expect(len(usages) == 1, "usage must come exactly once")
        return f"{len(chunks)} events, the first token after {first or 0.0:.2f} s"

    def _completions(self) -> str:
        body = {"model": self.model, "prompt": "Once upon a time", **SHORT}
        answer = self._ask("/completions", body)
        expect(answer["object"] == "text_completion", "the answer is no text_completion")
        text = answer["choices"][0]["text"]
        with self._endpoint.open(
            "POST", "/completions", {**body, "stream": True}, timeout_s=self._timeout
        ) as response:
            pieces = [c["choices"][0]["text"] for c in events_of(response) if c["choices"]]
        streamed = "".join(pieces)
        same = "the same" if streamed == text else "not the same (sampling, or a batch)"
        expect(streamed, "the stream has no text")
        return f"streamed in {len(pieces)} events, {same}"

    def _embeddings(self) -> str:
        for name in [n for n in self._names if n != self._model][:5] or self._names[:1]:
            body = {"model": name, "input": ["a cat", "a dog"]}
            reply = self._call("POST", "/embeddings", body)
            if reply.status != 200:
                continue
            vectors = [entry["embedding"] for entry in reply.json()["data"]]
            expect(len(vectors) == 2, "two texts did not give two vectors")
            coded = self._ask("/embeddings", {**body, "encoding_format": "base64"})["data"][0]
            data = base64.b64decode(coded["embedding"])
            numbers = struct.unpack(f"<{len(data) // 4}f", data)
            same = len(numbers) == len(vectors[0]) and all(
                abs(a - b) < 1e-3 for a, b in zip(numbers, vectors[0], strict=True)
            )
            expect(same, "base64 and numbers are not the same vector")
            return f"{name}: vectors of {len(numbers)} numbers"
        raise NotHereError("no model makes vectors")

    def _tools(self) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": "How is the weather in Paris?"}],
            "tools": [WEATHER],
            "tool_choice": "required",
            "max_tokens": 64,
            "temperature": 0,
        }
        message = self._ask("/chat/completions", body)["choices"][0]["message"]
        if not message.get("tool_calls") and not self._is_ours:
            raise NotHereError("the model calls no tool")
        call = message["tool_calls"][0]["function"]
        arguments = json.loads(call["arguments"])
        expect(call["name"] == "weather", "another function is called")
        expect(arguments["city"] in ("Paris", "Rome"), "the arguments do not fit the schema")
        return f"weather({call['arguments']})"

    def _schema(self) -> str:
        form = {"name": "answer", "schema": SCHEMA, "strict": True}
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": "What color is grass? Answer in JSON."}],
            "response_format": {"type": "json_schema", "json_schema": form},
            "max_tokens": 64,
            "temperature": 0,
        }
        text = self._ask("/chat/completions", body)["choices"][0]["message"]["content"]
        try:
            fits = json.loads(text)["color"] in ("red", "green")
        except (ValueError, KeyError, TypeError):
            fits = False
        expect(fits, f"the answer does not fit the schema: {text!r:.100}")
        return str(text).strip()

    def _responses(self) -> str:
        body = {"model": self.model, "input": "Say hello.", "max_output_tokens": 16}
        answer = self._ask("/responses", {**body, "store": False})
        expect(answer["object"] == "response", "the answer is no response")
        expect(answer["status"] in ("completed", "incomplete"), f"it is {answer['status']}")
        return str(answer["status"])

    def _anthropic(self) -> str:
        body = {"model": self.model, "max_tokens": 8, "messages": QUESTION}
        answer = self._ask("/v1/messages", body, at_root=True)
        expect(answer["type"] == "message", "the answer is no message")
        expect(answer["usage"]["output_tokens"] > 0, "the usage is missing")
        with self._endpoint.open(
            "POST", "/v1/messages", {**body, "stream": True}, at_root=True, timeout_s=self._timeout
        ) as response:
            kinds = [event["type"] for event in events_of(response)]
        expect(kinds[:1] == ["message_start"], "the stream does not begin with message_start")
        expect(kinds[-1:] == ["message_stop"], "the stream does not end with message_stop")
        return f"{len(kinds)} events"

    def _ollama(self) -> str:
        reply = self._call("GET", "/api/version", at_root=True)
        if reply.status in MISSING:
            raise NotHereError(f"/api/version answers with status {reply.status}")
        version = checked(reply).json()["version"]
        names = [
            m["name"]
            for m in checked(self._call("GET", "/api/tags", at_root=True)).json()["models"]
        ]
        expect(names, "no model is listed")
        body = {"model": self.model, "messages": QUESTION, "options": {"num_predict": 8}}
        lines = checked(self._call("POST", "/api/chat", body, at_root=True)).body.splitlines()
        last = json.loads(lines[-1])
        expect(last["done"] and last["eval_count"] > 0, "the last line is not that of an end")
        return f"version {version}, {len(lines)} lines"

    def _cancel(self) -> str:
        """A client that leaves frees its place."""
        before = self._num_running()
        if before:  # perhaps by the check before: a gateway hears of it twice a second
            time.sleep(STALE_S)
            before = self._num_running()
        body = {"model": self.model, "messages": QUESTION, "stream": True, "max_tokens": 100_000}
        if self._is_ours:
            body |= {"ignore_eos": True, "max_tokens": 512}
        with self._endpoint.open(
            "POST", "/chat/completions", body, timeout_s=self._timeout
        ) as response:
            began, seen = time.monotonic(), False
            for chunk in events_of(response):
                if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                    seen = before is not None and (self._num_running() or 0) > before
                    if before is None or seen or time.monotonic() - began > SEEN_S:
                        break
        left = time.monotonic()
        if seen:
            while (self._num_running() or 0) > (before or 0):
                expect(time.monotonic() - left < GONE_S, f"still computed after {GONE_S:.0f} s")
                time.sleep(0.05)
            return f"no longer computed after {time.monotonic() - left:.2f} s"
        self._ask("/chat/completions", {"model": self.model, "messages": QUESTION, **SHORT})
        return f"the next answer came after {time.monotonic() - left:.2f} s"

    def _num_running(self) -> int | None:
        """Requests that are computed for this model; None where that is not told."""
        reply = self._call("GET", "/status", at_root=True)
        with suppress(EndpointError, KeyError, TypeError, ValueError):
            models = checked(reply).json()["models"]
            return sum(int(m["num_running"]) for m in models)
        return None

    def _errors(self) -> str:
        shapes = []
        unknown = {"model": "no-such-model-here", "messages": QUESTION, **SHORT}
        for name, status, reply in (
            ("unknown model", 404, self._call("POST", "/chat/completions", unknown)),
            ("broken JSON", 400, self._call("POST", "/chat/completions", b"{nonsense")),
            ("unknown route", 404, self._call("GET", "/no/such/route")),
            ("wrong method", 405, self._call("DELETE", "/chat/completions")),
        ):
            if reply.status == 200 and name == "unknown model" and not self._is_ours:
                continue  # a server of one model may take any name
            expect(400 <= reply.status < 500, f"{name}: status {reply.status}")
            if not self._is_ours:
                continue
            expect(reply.status == status, f"{name}: status {reply.status}, not {status}")
            error = reply.json()["error"]
            expect(set(error) >= {"message", "type", "param", "code"}, f"{name}: {sorted(error)}")
            expect("x-request-id" in reply.headers, f"{name}: no x-request-id")
            shapes.append(name)
        return ", ".join(shapes) or "refused as they should be"

    def _key(self) -> str:
        wrong = Endpoint(self._endpoint.base, "wrong-key-of-llmkit-smoke")
        status = wrong.call("GET", "/models", timeout_s=self._timeout).status
        if status in (401, 403):
            return "a wrong one is refused"
        expect(status == 200, f"a wrong one gets status {status}")
        raise NotHereError("none is needed")

    def _metrics(self) -> str:
        reply = self._call("GET", "/metrics", at_root=True)
        if reply.status in (*MISSING, 401, 403):
            raise NotHereError(f"/metrics answers with status {reply.status}")
        kind = checked(reply).headers.get("content-type", "")
        expect(kind.startswith("text/plain"), f"their type is {kind}")
        names = {
            line.split()[2]
            for line in reply.body.decode().splitlines()
            if line.startswith("# TYPE")
        }
        expect(names, "there are no metrics")
        if self._is_ours and self._model:
            wanted = {"vllm:num_requests_running", "llamacpp:requests_processing"}
            missing = sorted(w for w in wanted if w not in names)
            expect(not missing, f"{', '.join(missing)} is missing")
        return f"{len(names)} families"

    def _docs(self) -> str:
        reply = self._call("GET", "/openapi.json", at_root=True)
        if reply.status in (*MISSING, 401, 403):
            raise NotHereError(f"/openapi.json answers with status {reply.status}")
        count = len(checked(reply).json()["paths"])
        page = self._call("GET", "/docs", at_root=True)
        if page.status not in MISSING:
            expect(b"<html" in checked(page).body.lower(), "/docs is no page")
        return f"{count} routes"


def _is_about_model(reply: Reply) -> bool:
    """Whether a 404 names a model: the route is there then."""
    with suppress(EndpointError, KeyError, TypeError, AttributeError):
        return "model" in str(reply.json()["error"]["code"])
    return False
