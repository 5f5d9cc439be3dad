"""Any sequence of changes to a stored conversation, against a model of plain Python."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmkit.errors import ConflictError, NotFoundError
from llmkit.protocol import Message
from llmkit.store.conversations import ConversationStore
from llmkit.store.database import open_database

TEXTS = st.sampled_from(["a", "b", "ä", ""])


class Trees(RuleBasedStateMachine):
    """``nodes`` are (parent, text, status) by id, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.database = open_database(f"sqlite:///{self.folder.name}/llmkit.db")
        self.stores = [ConversationStore(self.database) for _ in range(2)]
        self.id = self.stores[0].create("ann").id
        self.nodes: dict[str, tuple[str | None, str, str]] = {}
        self.head: str | None = None
        self.running: dict[str, tuple[ConversationStore, str | None, str | None]] = {}
        self.version = 1

    def teardown(self) -> None:
        self.database.close()
        self.folder.cleanup()

    def place(self, index: int) -> str | None:
        """Any message, or none."""
        ids = [None, *self.nodes]
        return ids[index % len(ids)]

    def took(self, added: list[Any]) -> None:
        for message in added:
            self.nodes[message.id] = (message.parent_id, message.content, message.status)
        self.version += 1

    def path(self, leaf: str | None) -> list[str]:
        found: list[str] = []
        while leaf is not None:
            found.append(leaf)
            leaf = self.nodes[leaf][0]
        return found[::-1]

    @rule(which=st.booleans(), index=st.integers(0, 50), texts=st.lists(TEXTS, max_size=3))
    def append(self, which: bool, index: int, texts: list[str]) -> None:
        parent = self.place(index)
        new = [Message("user", text) for text in texts]
        act: Callable[[], Any] = lambda: self.stores[which].append("ann", self.id, parent, new)  # noqa: E731
        if parent in self.running:
            with pytest.raises(ConflictError):
                act()
            return
        added = act()
        self.took(added)
        if added:
            self.head = added[-1].id

    @rule(which=st.booleans(), index=st.integers(0, 50), branch=st.booleans())
    def begin(self, which: bool, index: int, branch: bool) -> None:
        parent, before = self.place(index), self.head
        new = [Message("user", "q")]
        blocked = parent in self.running or any(
            parent in (stem, self.nodes[reply][0]) for reply, (_, stem, _) in self.running.items()
        )
        if blocked and not branch:
            with pytest.raises(ConflictError):
                self.stores[which].begin_turn("ann", self.id, parent, new)
            return
        added = self.stores[which].begin_turn("ann", self.id, parent, new, branch=branch)
        stem = self.running[parent][1] if parent in self.running else parent
        assert added[0].parent_id == stem
        self.took(added)
        self.head = added[-1].id
        self.running[added[-1].id] = self.stores[which], stem, before

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, 50), text=TEXTS)
    def end(self, index: int, text: str) -> None:
        reply = list(self.running)[index % len(self.running)]
        store, _, _ = self.running.pop(reply)
        store.end_reply(self.id, reply, Message("assistant", text))
        self.nodes[reply] = (self.nodes[reply][0], text, "complete")
        self.version += 1

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, 50), text=TEXTS)
    def checkpoint(self, index: int, text: str) -> None:
        reply = list(self.running)[index % len(self.running)]
        self.running[reply][0].update_reply(self.id, reply, text)
        self.nodes[reply] = (self.nodes[reply][0], text, "running")

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, 50))
    def cancel(self, index: int) -> None:
        reply = list(self.running)[index % len(self.running)]
        store, stem, before = self.running.pop(reply)
        store.cancel_turn(self.id, reply)
        gone: str | None = reply
        while gone is not None and gone != stem:
            if any(parent == gone for parent, _, _ in self.nodes.values()):
                break
            parent = self.nodes.pop(gone)[0]
            if self.head == gone:
                self.head = parent
            gone = parent
        if self.head == stem and (before is None or before in self.nodes):
            self.head = before
        self.version += 1

    @rule(which=st.booleans(), index=st.integers(0, 50))
    def show(self, which: bool, index: int) -> None:
        self.head = self.place(index)
        changed = self.stores[which].change("ann", self.id, head=self.head, version=self.version)
        self.version += 1
        assert changed.version == self.version

    @rule(which=st.booleans(), index=st.integers(0, 50))
    def look(self, which: bool, index: int) -> None:
        """With what each store remembers."""
        leaf = self.place(index)
        if leaf is not None:
            path = self.stores[which].path("ann", self.id, leaf)
            assert [m.id for m in path] == self.path(leaf)
            assert [(m.content, m.status) for m in path] == [
                self.nodes[m.id][1:] for m in path
            ]  # fmt: skip

    @rule(index=st.integers(0, 50))
    def fork(self, index: int) -> None:
        leaf = self.place(index)
        if leaf is None:
            return
        wanted = [self.nodes[each][1] for each in self.path(leaf) if each not in self.running]
        copy = self.stores[0].fork("ann", self.id, leaf)
        assert [m.content for m in self.stores[1].path("ann", copy.id)] == wanted
        self.stores[0].delete("ann", copy.id)
        with pytest.raises(NotFoundError):
            self.stores[1].get("ann", copy.id)

    @rule()
    def export(self) -> None:
        copy = self.stores[0].import_("ann", self.stores[1].export("ann", self.id))
        wanted = [self.nodes[each][1] for each in self.path(self.head)]
        assert [m.content for m in self.stores[0].path("ann", copy.id)] == wanted
        assert copy.num_messages == len(self.nodes)
        self.stores[0].delete("ann", copy.id)

    @invariant()
    def is_same(self) -> None:
        known = self.stores[0].get("ann", self.id)
        assert (known.head, known.version, known.num_messages) == (
            self.head,
            self.version,
            len(self.nodes),
        )
        messages = self.stores[0].messages("ann", self.id)
        assert {m.id: (m.parent_id, m.content, m.status) for m in messages} == self.nodes
        numbers = {m.id: m.number for m in messages}
        assert all(m.parent_id is None or numbers[m.parent_id] < m.number for m in messages)
        assert len(set(numbers.values())) == len(messages)


TestTrees = Trees.TestCase
TestTrees.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
