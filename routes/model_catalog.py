"""/v1/models and the paths beside it: which models there are, in OpenAI's and OpenRouter's shapes.

No key is needed. A test key gets the sandbox's models, any other the upstream's.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from common.errors import ModelNotFound
from common.json_types import Json
from gateway.pricing.catalog import upstream_json
from gateway.runtime.instance import Runtime
from models import errors_of
from routes.dependencies import Running, model_index, running, shown_environment
from routes.http.responses import JsonResponse
from routes.schemas.openrouter import CountAnswer

router = APIRouter(tags=["public"], responses=errors_of(503))

Offset = Annotated[int, Query(ge=0, le=2**31 - 1, description="How many models to leave out at the start")]
Limit = Annotated[
    int | None, Query(ge=1, le=1000, description="The most models to list; all of them without it")
]


@router.get(
    "/v1/models",
    summary="The models, as OpenAI's and OpenRouter's clients read them",
    responses=errors_of(400),
)
@router.get("/api/v1/models", include_in_schema=False)
async def list_models(request: Request, offset: Offset = 0, limit: Limit = None) -> Response:
    """All of them, or a page: `total_count` says how many there are, `links.next` where the next page is."""
    runtime = await running(request)
    index = await model_index(request, runtime)
    whole = offset == 0 and limit is None
    page = index.json if whole else index.page(offset, limit, request.url.path)
    return Response(page, media_type="application/json")


@router.get(
    "/v1/model/{author}/{slug}",
    summary="One model, as OpenRouter's clients read it",
    responses=errors_of(404),
)
@router.get("/api/v1/model/{author}/{slug}", include_in_schema=False)
async def read_model_of_author(request: Request, runtime: Running, author: str, slug: str) -> Response:
    entry = await _entry(request, runtime, f"{author}/{slug}", "slug")
    return Response(upstream_json({"data": entry}), media_type="application/json")


@router.get("/v1/models/count", summary="How many models there are", response_model=CountAnswer)
@router.get("/api/v1/models/count", include_in_schema=False)
async def count_models(request: Request, runtime: Running) -> Response:
    index = await model_index(request, runtime)
    return JsonResponse(CountAnswer(data={"count": len(index.raw)}))


@router.get(
    "/v1/models/{author}/{slug}/endpoints",
    summary="The providers of a model, with their prices",
    responses={
        200: {
            "content": {
                "application/json": {
                    "example": {
                        "data": {"id": "openai/gpt-4o-mini", "endpoints": [{"provider_name": "OpenAI"}]}
                    }
                }
            }
        },
        **errors_of(404),
    },
)
@router.get("/api/v1/models/{author}/{slug}/endpoints", include_in_schema=False)
async def list_endpoints(request: Request, runtime: Running, author: str, slug: str) -> Response:
    """As the upstream has it, at most five minutes old."""
    environment, model_id = shown_environment(request), f"{author}/{slug}"
    index = await runtime.catalog(environment).models()
    if index.get(model_id) is None:
        raise _unknown(model_id, "slug")
    providers = await runtime.provider_endpoints(environment).get(model_id)
    if providers is None:
        raise _unknown(model_id, "slug")
    return Response(providers, media_type="application/json")


# Declared last: it would take the paths above for models.
@router.get("/v1/models/{model_id:path}", summary="One model", responses=errors_of(404))
@router.get("/api/v1/models/{model_id:path}", include_in_schema=False)
async def read_model(request: Request, runtime: Running, model_id: str) -> Response:
    entry = await _entry(request, runtime, model_id, "model")
    return Response(upstream_json(entry), media_type="application/json")


async def _entry(request: Request, runtime: Runtime, model_id: str, param: str) -> dict[str, Json]:
    entry = (await model_index(request, runtime)).entry(model_id)
    if entry is None:
        raise _unknown(model_id, param)
    return entry


def _unknown(model_id: str, param: str) -> ModelNotFound:
    return ModelNotFound(
        f"The model `{model_id[:256]}` does not exist. GET /v1/models lists those that do.", param=param
    )
