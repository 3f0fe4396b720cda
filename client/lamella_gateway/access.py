"""Whose request it is, and whether it may: the API key in the header, its scopes, and the address where none is needed.

Neighbours: `api_keys` (what a key may do), `meter` (how often).
"""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from lamella.messages import JobStatus
from lamella_gateway import service as services
from lamella_gateway.api_error import ApiError
from lamella_gateway.api_keys import ApiKey, Endpoint, read_key, split_key
from lamella_gateway.settings import is_loopback


@dataclass(frozen=True)
class Caller:
    """Who asks: an API key, or None where the gateway asks for none."""

    key: ApiKey | None

    @property
    def user(self) -> str | None:
        """Whose jobs they are in the fair queue; None where the request may say."""
        return None if self.key is None else self.key.user

    @property
    def is_admin(self) -> bool:
        """Whether workers and everybody's jobs are the caller's to see; so it is where nobody needs a key."""
        return self.key is None or self.key.is_admin

    def check_admin(self) -> None:
        """Raise ApiError where the key is not an administrator's."""
        if not self.is_admin:
            raise ApiError(
                403,
                "this API key sees its own jobs only; make one that sees workers and all jobs with "
                "`lamella keys create NAME --admin`",
                type="permission_error",
                code="admin_required",
            )

    def check_model(self, model: str) -> None:
        """Raise ApiError where the key may not use the model."""
        if self.key is not None and not self.key.allows_model(model):
            allowed = ", ".join(self.key.models or ())
            raise ApiError(
                403,
                f"this API key may not use {model[:200]!r}; it may use {allowed or 'no model'}",
                type="permission_error",
                param="model",
                code="model_not_allowed",
            )

    def owns(self, status: JobStatus) -> bool:
        """Return whether a job is one that the caller may see."""
        return self.key is None or status.user == self.key.user

    def sees(self, status: JobStatus) -> bool:
        """Return whether the caller may know of a job, and cancel or retry it; what it says is for its owner alone."""
        return self.is_admin or self.owns(status)


async def identify(request: Request, endpoint: Endpoint | None = None) -> Caller:
    """Return who asks, if they may call `endpoint`.

    Raises:
        ApiError: 401 without a valid key, 403 where the key's scopes leave the endpoint out.
    """
    service = services.of(request)
    if not service.settings.requires_key:
        _check_local(request)
        return Caller(None)
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    parts = split_key(text.strip()) if scheme.lower() == "bearer" else None
    stored = None if parts is None else await service.connection.run(read_key(service.connection.keys, parts[0]))
    if parts is None or stored is None or not stored.is_opened_by(parts[1]) or stored.key.revoked_at is not None:
        raise _no_key(has_one=bool(text))
    if endpoint is not None and not stored.key.allows(endpoint):
        raise ApiError(
            403,
            f"this API key may not call {endpoint.value}; make one that may with `lamella keys create`",
            type="permission_error",
            code="endpoint_not_allowed",
        )
    return Caller(stored.key)


def _no_key(has_one: bool) -> ApiError:
    what = "this API key is not valid: it is wrong or was revoked" if has_one else "there is no API key"
    return ApiError(
        401,
        f"{what}; send `Authorization: Bearer sk-lamella-...` with a key of `lamella keys create`",
        type="authentication_error",
        code="invalid_api_key",
    )


def _check_local(request: Request) -> None:
    """Refuse names that another site's page could have pointed at this machine."""
    host = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
    if host and not is_loopback(host):
        raise ApiError(
            403,
            "without API keys this gateway answers under the names of this machine only: localhost or 127.0.0.1",
            type="permission_error",
            code="host_not_allowed",
        )
