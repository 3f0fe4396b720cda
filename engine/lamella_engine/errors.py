"""Every exception the engine raises.

::

    EngineError
    ├── ModelError                  the model cannot be had or cannot run
    │   ├── ModelNameError          the name could escape the store, or is not a model name
    │   ├── ModelNotFound           neither in the store, nor at the path, nor on the hub
    │   ├── UnsupportedModel        the family cannot run here (said before any shard is written)
    │   ├── CheckpointError         the source files are corrupt, incomplete or of an unknown kind
    │   ├── ShardError              a built shard is missing, truncated or altered
    │   ├── PeerError               another host did not give the model
    │   │   ├── PeerLacksModel      it does not have it
    │   │   └── PeerCut             it was away, hung or broke off; asking again may help
    │   └── DiskFull                the store lacks room (``needed_bytes``, ``free_bytes``)
    ├── SequenceError               this one sequence cannot run (``code`` travels to the client)
    ├── DeviceError                 the device does not exist or cannot do what was asked
    ├── OptionError                 an engine option that cannot work
    │   └── PlanError               the model does not fit the budgets (``missing_bytes``)
    └── EngineClosed                the engine was used after close()
"""

from __future__ import annotations


class EngineError(Exception):
    """Root of every error raised by the engine."""


class ModelError(EngineError):
    """The model cannot be had or cannot run."""


class ModelNameError(ModelError):
    """The name could mean a path outside the store, or is not a model name."""


class ModelNotFound(ModelError):
    """The model is neither in the store, nor at the given path, nor on the hub."""


class UnsupportedModel(ModelError):
    """The model's family cannot run in the packed sweep."""


class CheckpointError(ModelError):
    """The source checkpoint is corrupt, incomplete or of an unknown kind."""


class ShardError(ModelError):
    """A built shard is missing, truncated or altered."""


class PeerError(ModelError):
    """Another host, asked for a model's shards, did not give them, or not those it promised."""


class PeerLacksModel(PeerError):
    """The peer does not have the model."""


class PeerCut(PeerError):
    """The peer was away, hung or broke off; asking again from there on may help."""


class DiskFull(ModelError):
    """The store's file system lacks room for the shards.

    Attributes:
        needed_bytes: what building still has to write.
        free_bytes: what is free.
    """

    def __init__(self, message: str, needed_bytes: int, free_bytes: int) -> None:
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        super().__init__(message)


class SequenceError(EngineError):
    """One sequence cannot run; the others are unharmed.

    Attributes:
        code: machine-readable reason: ``prompt_empty``, ``prompt_too_long``, ``bad_token``, ``no_chat_template``,
            ``duplicate`` or ``engine``.
    """

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


class DeviceError(EngineError):
    """The device does not exist or cannot do what was asked."""


class OptionError(EngineError):
    """An engine option that cannot work; the message names it and the fix."""


class PlanError(OptionError):
    """The model does not fit the budgets; the message says by how much, and what would fit.

    Attributes:
        missing_bytes: what the budget lacks.
    """

    def __init__(self, message: str, missing_bytes: int) -> None:
        self.missing_bytes = missing_bytes
        super().__init__(message)


class EngineClosed(EngineError):
    """The engine was used after close()."""
