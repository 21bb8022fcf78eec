"""/v1/models and the paths beside it: which models there are, in OpenAI's and OpenRouter's shapes.

No key is needed. A test key gets the sandbox's models, any other the upstream's.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from common.errors import ModelNotFound
from gateway.pricing.catalog import upstream_json
from models import errors_of
from routes.dependencies import Running, running, shown_environment
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
    index = await runtime.catalog(shown_environment(request)).models()
    whole = offset == 0 and limit is None
    return Response(
        index.json if whole else index.page(offset, limit, request.url.path), media_type="application/json"
    )


@router.get(
    "/v1/model/{author}/{slug}",
    summary="One model, as OpenRouter's clients read it",
    responses=errors_of(404),
)
@router.get("/api/v1/model/{author}/{slug}", include_in_schema=False)
async def read_model_of_author(request: Request, author: str, slug: str) -> Response:
    return Response(
        upstream_json({"data": await _entry(request, f"{author}/{slug}", "slug")}),
        media_type="application/json",
    )


@router.get("/v1/models/count", summary="How many models there are", response_model=CountAnswer)
@router.get("/api/v1/models/count", include_in_schema=False)
async def count_models(request: Request, runtime: Running) -> Response:
    index = await runtime.catalog(shown_environment(request)).models()
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
    providers = (
        None if index.get(model_id) is None else await runtime.provider_endpoints(environment).get(model_id)
    )
    if providers is None:
        raise _unknown(model_id, "slug")
    return Response(providers, media_type="application/json")


# Last, since it takes the paths above for models.
@router.get("/v1/models/{model_id:path}", summary="One model", responses=errors_of(404))
@router.get("/api/v1/models/{model_id:path}", include_in_schema=False)
async def read_model(request: Request, model_id: str) -> Response:
    return Response(upstream_json(await _entry(request, model_id, "model")), media_type="application/json")


async def _entry(request: Request, model_id: str, param: str) -> dict[str, Any]:
    runtime = await running(request)
    entry = (await runtime.catalog(shown_environment(request)).models()).entry(model_id)
    if entry is None:
        raise _unknown(model_id, param)
    return entry


def _unknown(model_id: str, param: str) -> ModelNotFound:
    return ModelNotFound(
        f"The model `{model_id[:256]}` does not exist. GET /v1/models lists those that do.", param=param
    )
