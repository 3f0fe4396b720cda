"""A dialogue on a terminal: its commands, what it keeps on disk, and that nothing but its end ends it."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from lamella.cli.conversation import Conversation, chat_path
from lamella.embedded import EmbeddedServer
from lamella.errors import RequestError
from tests.client.acting_worker import ActingWorker
from tests.client.answering_worker import AnsweringWorker
from tests.waiting import wait_until


class Terminal:
    """A chat on a pseudo-terminal: types, and sees what is shown."""

    def __init__(self, *args: str) -> None:
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "lamella", "chat", *args]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def see(self, text: str, deadline_s: float = 40.0) -> str:
        """Read until a text was shown, and return all that was shown up to its end."""
        deadline = time.monotonic() + deadline_s
        while text not in self.shown:
            ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} was not shown, but {self.shown!r}"
            self.shown += os.read(self._ours, 65536).decode(errors="replace")
        seen, _, self.shown = self.shown.partition(text)
        return seen + text

    def leave(self) -> int:
        """Press Ctrl-D at the next prompt, and wait for the end; before a prompt it would not count."""
        self.see("> ")
        self.type("\x04")
        return self.end()

    def end(self) -> int:
        """Wait for the end, reading on, and return the exit code."""
        deadline = time.monotonic() + 40
        while self.process.poll() is None and time.monotonic() < deadline:
            ready, _, _ = select.select([self._ours], [], [], 0.1)
            if ready:
                try:
                    self.shown += os.read(self._ours, 65536).decode(errors="replace")
                except OSError:
                    break
        return self.process.wait(40)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(40)
        os.close(self._ours)


@pytest.fixture
def state(embedded_server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAMELLA_REDIS_URL", embedded_server.url)
    monkeypatch.setenv("LAMELLA_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("TERM", "xterm")
    return tmp_path / "state"


@pytest.fixture
def worker(state: Path, embedded_redis: redis.Redis) -> ActingWorker:
    worker = ActingWorker(embedded_redis)
    worker.announce()
    return worker


@pytest.fixture
def chat(worker: ActingWorker) -> Iterator[Callable[..., Terminal]]:
    terminals: list[Terminal] = []

    def start(*args: str) -> Terminal:
        terminal = Terminal(*args)
        terminals.append(terminal)
        terminal.see("> ")
        return terminal

    yield start
    for terminal in terminals:
        terminal.close()


def test_commands_change_what_is_asked(chat: Callable[..., Terminal], worker: ActingWorker, state: Path) -> None:
    with AnsweringWorker(worker) as answering:
        terminal = chat()
        terminal.type("/system Be short.\n/set max_tokens 7\nfirst\n")
        terminal.see("<first>")
        terminal.type("/retry\n")
        terminal.see("<first>")
        terminal.type("second\n")
        terminal.see("<second>")
        terminal.type("/undo\n/stats\n/nonsense\n/set max_tokens many\n/model other\n/help\n")
        told = terminal.see("like Ctrl-D")
        terminal.type("/save kept\n/reset\nthird\n")
        terminal.see("<third>")
        terminal.type("/load kept\n")
        terminal.see("going on with 1 questions")
        terminal.type("/quit\n")

        assert terminal.end() == 0

    kept = json.loads((state / "chats" / "kept.json").read_text())
    assert [message["content"] for message in kept["messages"]] == ["Be short.", "first", "<first>"]
    assert answering.asked == ["first", "first", "second", "third"]
    for expected in ("forgotten: second", "3 answers", "no command '/nonsense'", "use a number", "serves 'other'"):
        assert expected in told
    last = json.loads((state / "chats" / "last.json").read_text())
    assert [message["content"] for message in last["messages"]] == ["Be short.", "third", "<third>"]


def test_ctrl_c_cancels_the_answer_and_stays(chat: Callable[..., Terminal], worker: ActingWorker) -> None:
    with AnsweringWorker(worker, holds={"long"}) as answering:
        terminal = chat()
        terminal.type("long\n")
        wait_until(lambda: answering.asked)

        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.see("(cancelled; /retry asks again)")
        terminal.type("short\n")
        terminal.see("<short>")
        terminal.see("> ")  # until then Ctrl-C would be about the answer
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.see("(Ctrl-D ends the chat)")
        assert terminal.leave() == 0


def test_several_lines_are_one_question(chat: Callable[..., Terminal], worker: ActingWorker) -> None:
    with AnsweringWorker(worker) as answering:
        terminal = chat()
        terminal.type('"""one\ntwo\n"""\n')
        terminal.see("<one\r\ntwo>")
        terminal.type("three\\\nfour\n")
        terminal.see("four>")
        terminal.leave()

    assert answering.asked == ["one\ntwo", "three\nfour"]


def test_a_dialogue_goes_on_where_the_last_one_ended(chat: Callable[..., Terminal], worker: ActingWorker) -> None:
    with AnsweringWorker(worker):
        first = chat()
        first.type("hello\n")
        first.see("<hello>")
        first.leave()
        second = Terminal("--continue")
        try:
            second.see("> hello")
            second.type("again\n")
            second.see("<again>")
            second.leave()
        finally:
            second.close()

    newest = worker.redis.zrevrange(worker.keys.jobs, 0, 0)[0]
    said = re.findall(r'"content":"([^"]*)"', worker.redis.hget(worker.keys.job(newest), "request") or "")
    assert said == ["hello", "<hello>", "again"]


def test_what_is_kept_can_be_read_by_the_user_only(
    chat: Callable[..., Terminal], worker: ActingWorker, state: Path
) -> None:
    with AnsweringWorker(worker):
        terminal = chat()
        terminal.type("secret\n")
        terminal.see("<secret>")
        terminal.leave()

    for path in (state / "chats" / "last.json", state / "chat_history"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_without_history_nothing_is_written(chat: Callable[..., Terminal], worker: ActingWorker, state: Path) -> None:
    with AnsweringWorker(worker):
        terminal = chat("--no-history")
        terminal.type("secret\n")
        terminal.see("<secret>")
        terminal.leave()

    assert not list(state.rglob("*")) if state.exists() else True


def test_a_lost_server_does_not_end_the_dialogue(chat: Callable[..., Terminal], worker: ActingWorker) -> None:
    worker.redis.delete(worker.keys.worker(worker.name))
    terminal = chat()
    terminal.type("hello\n")
    terminal.see("error: no model is named and no live worker")
    worker.announce()
    with AnsweringWorker(worker):
        terminal.type("/retry\n")
        terminal.see("<hello>")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"version": 1, "messages": [{"role": "user"}]}', "\xff", '{"version": 1, "messages": 3}',
     '{"version": 1, "messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}'],
)  # fmt: skip
def test_a_file_that_is_no_conversation_is_a_message(tmp_path: Path, content: str) -> None:
    path = tmp_path / "chat.json"
    path.write_text(content, encoding="latin-1")

    with pytest.raises(RequestError, match="is no conversation"):
        Conversation.load(path)


@pytest.mark.parametrize("name", ["..", ".x", "", "a b", "x" * 65])
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="is no name"):
        chat_path(name)


def test_a_conversation_is_the_same_after_saving(tmp_path: Path) -> None:
    conversation = Conversation("Be kind.", "tiny/model")
    conversation.add("question", "answer\n\x1b[31m")

    conversation.save(tmp_path / "deep" / "c.json")
    loaded = Conversation.load(tmp_path / "deep" / "c.json")

    assert (loaded.system, loaded.model, loaded.turns) == ("Be kind.", "tiny/model", conversation.turns)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["c.json"]
