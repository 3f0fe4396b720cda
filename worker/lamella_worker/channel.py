"""Frames over a socket pair: four bytes of length, then that many bytes; one writer at a time, one reader.

Owns the framing and its bound. What a frame means is in `engine_messages`. A send waits as long as the other side
reads, and an answer as long as it lives: the supervisor of the engine process ends both by ending that process.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

MAX_FRAME_BYTES = 128 * 2**20  # a prompt of four million characters and a million tokens of an earlier life fit
_LENGTH = struct.Struct(">I")


class ChannelBroken(Exception):
    """The other side is gone, or says what cannot be read."""


class Channel:
    """One end of a socket pair; `close` belongs to its owner."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._writing = threading.Lock()

    def send(self, frame: bytes) -> None:
        """Send one frame; callable from any thread.

        Raises:
            ChannelBroken: the other side is gone, or the frame is too large.
        """
        if len(frame) > MAX_FRAME_BYTES:
            raise ChannelBroken(f"a message of {len(frame):,} bytes is more than the bound, {MAX_FRAME_BYTES:,}")
        try:
            with self._writing:
                self._socket.sendall(_LENGTH.pack(len(frame)) + frame)
        except OSError as error:
            raise ChannelBroken(f"the other side is gone ({error.strerror or error})") from error

    def receive(self) -> bytes | None:
        """The next frame, or None once the other side is gone; for one thread.

        Raises:
            ChannelBroken: a frame is longer than the bound.
        """
        head = self._read(_LENGTH.size)
        if head is None:
            return None
        (length,) = _LENGTH.unpack(head)
        if length > MAX_FRAME_BYTES:
            raise ChannelBroken(f"a message of {length:,} bytes was announced; the bound is {MAX_FRAME_BYTES:,}")
        body = self._read(length)
        return None if body is None else bytes(body)

    def close(self) -> None:
        """Close this end; a thread that reads or writes here comes back. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, length: int) -> bytearray | None:
        data = bytearray(length)
        view, done = memoryview(data), 0
        while done < length:
            try:
                count = self._socket.recv_into(view[done:])
            except OSError:
                return None  # reset, or closed by this side
            if not count:
                return None
            done += count
        return data
