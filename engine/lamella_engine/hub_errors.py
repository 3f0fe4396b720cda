"""What went wrong at the hub, in words: which model, why, and what to do.

`hub` makes the requests; this module only turns their exceptions into the engine's.
"""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from lamella_engine.errors import ModelError, ModelNameError, ModelNotFound

# The root of what the hub library's HTTP client raises; which client that is depends on the library's version.
_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]

HUB_ERRORS: tuple[type[Exception], ...] = (
    _TRANSPORT_ERROR, OSError, ValueError, KeyError, TypeError, RuntimeError, XetDownloadError,
)  # fmt: skip

_UNAUTHORISED = 401
_FORBIDDEN = 403
_TOO_MANY_REQUESTS = 429
_SERVER_ERROR = 500


@dataclass(frozen=True)
class HubRequest:
    """What was asked for: the repository, its revision (None: the default branch), where, and whether with a token."""

    repository: str
    revision: str | None
    endpoint: str
    has_token: bool

    @property
    def name(self) -> str:
        """``owner/name`` or ``owner/name@revision``."""
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"

    @property
    def token_hint(self) -> str:
        """Where a token is looked for, after a sentence on the one that was used."""
        used = "The token that was sent does not allow it" if self.has_token else "No access token was found"
        return (
            f"{used}; a token is looked for in the caller's own argument, the environment variable HF_TOKEN, and the "
            "login that `hf auth login` saves"
        )


def explain(error: Exception, request: HubRequest) -> ModelError:
    """The engine's error for `error`, one of `HUB_ERRORS`, raised while serving `request`."""
    if isinstance(error, HfHubHTTPError):
        return _explain_answer(error, request)
    if isinstance(error, HFValidationError):
        return ModelNameError(f"{request.name!r} is not a model on a hub; use 'owner/name' or 'owner/name@revision'")
    if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
        return ModelError(
            f"{request.name} must be fetched from the hub, and HF_HUB_OFFLINE forbids it. "
            "Models in the store and local paths work; else unset HF_HUB_OFFLINE."
        )
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        return _explain_answer(error.__cause__, request)
    if isinstance(error, (_TRANSPORT_ERROR, LocalEntryNotFoundError)):
        return _unreachable(error.__cause__ or error, request)
    return ModelError(
        f"{request.name} could not be fetched from {request.endpoint}: {type(error).__name__}: {_first_line(error)}. "
        "Try again; if HF_ENDPOINT is set, check that it points to a model hub."
    )


def _explain_answer(error: HfHubHTTPError, request: HubRequest) -> ModelError:
    status = int(error.response.status_code)
    if isinstance(error, GatedRepoError):
        return ModelError(
            f"{request.repository} is gated: its terms must be accepted at {request.endpoint}/{request.repository} "
            f"by the account whose token is used. {request.token_hint}."
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFound(
            f"{request.repository} has no revision {request.revision or 'main'!r} on {request.endpoint}; "
            "leave the part after '@' out for the newest"
        )
    if isinstance(error, RepositoryNotFoundError):
        return ModelNotFound(
            f"{request.endpoint} shows no model {request.repository!r}: it does not exist, or it is private. "
            f"Check the spelling ('owner/name'). If it is private: {request.token_hint}."
        )
    if isinstance(error, EntryNotFoundError):
        return ModelNotFound(f"{request.name} lacks a file it should have: {_first_line(error)}")
    if status in (_UNAUTHORISED, _FORBIDDEN):
        return ModelError(f"{request.endpoint} refuses access to {request.name} ({status}). {request.token_hint}.")
    if status == _TOO_MANY_REQUESTS:
        return ModelError(f"{request.endpoint} limits how often it answers ({status}); try again in a few minutes")
    if status >= _SERVER_ERROR:
        return ModelError(f"{request.endpoint} fails with {status} for {request.name}; try again later")
    return ModelError(f"{request.endpoint} answers {status} for {request.name}: {_first_line(error)}")


def _unreachable(error: BaseException, request: HubRequest) -> ModelError:
    return ModelError(
        f"the hub at {request.endpoint} cannot be reached to fetch {request.name} ({type(error).__name__}: "
        f"{_first_line(error)}). Check the network, the proxy and HF_ENDPOINT; models in the store and local paths "
        "work without it."
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
