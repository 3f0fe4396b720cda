"""The turns of a chat, and how they are kept on disk.

Owns the file's form, its place (``chats`` in the state directory) and that only the user can read it. Asks nothing
of the server. Neighbours: `dialogue` (which adds turns), `chat`.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from lamella.errors import RequestError
from lamella.messages import ChatMessage
from lamella.service_state import state_dir

LAST = "last"
SUFFIX = ".json"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    version: int
    model: str | None
    messages: tuple[ChatMessage, ...]


class Conversation:
    """Instructions and turns so far; `turns` begin with the user's and alternate.

    Attributes:
        system: instructions that precede the turns, or None.
        turns: what was said.
        model: the model that is asked, None for the only one that is served.
    """

    def __init__(self, system: str | None = None, model: str | None = None) -> None:
        self.system = system
        self.model = model
        self.turns: list[ChatMessage] = []

    def asking(self, text: str) -> list[ChatMessage]:
        """Return the messages of a request with a new question."""
        before = [ChatMessage(role="system", content=self.system)] if self.system else []
        return [*before, *self.turns, ChatMessage(role="user", content=text)]

    def add(self, question: str, answer: str) -> None:
        """Keep a question with its answer."""
        said = (ChatMessage(role="user", content=question), ChatMessage(role="assistant", content=answer))
        self.turns.extend(said)

    def take_back(self) -> str | None:
        """Forget the last question and its answer, and return the question; None if there is none."""
        if not self.turns:
            return None
        question = self.turns[-2].content
        del self.turns[-2:]
        return question

    def save(self, path: Path) -> None:
        """Write it; the file is replaced in one step and readable by this user only.

        Raises:
            OSError: it cannot be written.
        """
        system = [ChatMessage(role="system", content=self.system)] if self.system else []
        stored = _Stored(version=1, model=self.model, messages=(*system, *self.turns))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(stored.model_dump(mode="json", exclude_none=True), ensure_ascii=False, indent=1))
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read one.

        Raises:
            RequestError: the file is not there, or holds something else.
        """
        try:
            read = json.loads(path.read_bytes())
            stored = _Stored.model_validate({"model": None, **read} if isinstance(read, dict) else read)
        except FileNotFoundError as error:
            kept = ", ".join(saved_names()) or "none"
            raise RequestError(f"there is no conversation {path}; saved are: {kept}") from error
        except (OSError, ValueError, RecursionError) as error:
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise RequestError(f"{path} is no conversation of a chat: {why}") from error
        return cls._from(stored, path)

    @classmethod
    def _from(cls, stored: _Stored, path: Path) -> Conversation:
        messages = list(stored.messages)
        system = messages.pop(0).content if messages and messages[0].role == "system" else None
        found = cls(system, stored.model)
        for question, answer in zip(messages[::2], messages[1::2], strict=False):
            if (question.role, answer.role) != ("user", "assistant"):
                raise RequestError(f"{path} is no conversation of a chat: its turns do not alternate")
            found.turns += [question, answer]
        return found


def chat_path(name: str) -> Path:
    """Return the file for a name; what has a slash in it is a path.

    Raises:
        RequestError: it cannot be a name.
    """
    if "/" in name:
        return Path(name).expanduser()
    if not _NAME.fullmatch(name):
        raise RequestError(f"{name[:60]!r} is no name for a conversation; use letters, digits, '.', '_' and '-'")
    return chats_dir() / f"{name}{SUFFIX}"


def chats_dir() -> Path:
    """Return the directory of the conversations."""
    return state_dir() / "chats"


def saved_names() -> list[str]:
    """Return the names of the conversations that are kept."""
    try:
        return sorted(path.name.removesuffix(SUFFIX) for path in chats_dir().glob(f"*{SUFFIX}"))
    except OSError:
        return []
