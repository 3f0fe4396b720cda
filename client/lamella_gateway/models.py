"""``GET /v1/models`` and ``/v1/models/{id}``: what live workers serve, as far as the key may use it."""

from __future__ import annotations

from typing import Literal

from starlette.requests import Request
from starlette.responses import JSONResponse
from typing_extensions import TypedDict

from lamella import ModelInfo
from lamella_gateway import service as services
from lamella_gateway.access import identify
from lamella_gateway.api_error import unknown_model


class ModelBody(TypedDict):
    """A model; what follows `owned_by` is Lamella's own."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    family: str


class ModelsBody(TypedDict):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelBody]


async def list_models(request: Request) -> JSONResponse:
    """List the models."""
    caller = await identify(request)
    models = await services.of(request).models.all()
    shown = [_body(each) for each in models if caller.key is None or caller.key.allows_model(each.name)]
    return JSONResponse(ModelsBody(object="list", data=shown))


async def retrieve_model(request: Request) -> JSONResponse:
    """Tell about one model."""
    caller = await identify(request)
    name = request.path_params["model"]
    if caller.key is not None and not caller.key.allows_model(name):
        raise unknown_model(name)
    return JSONResponse(_body(await services.of(request).models.find(name)))


def _body(model: ModelInfo) -> ModelBody:
    return ModelBody(
        id=model.name,
        object="model",
        created=0,
        owned_by=model.name.partition("/")[0] if "/" in model.name else "lamella",
        context_length=model.context_length,
        family=model.family,
    )
