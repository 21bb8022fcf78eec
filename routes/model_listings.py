"""Who serves a model, and how many models are there? OpenRouter's public answers, of models that are in our list."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from errors import ModelNotFound
from models import ErrorBody
from models_openrouter import CountAnswer
from replies import Reply
from runtime import Runtime
from security import shown_environment

router = APIRouter(tags=["public"], responses={503: {"model": ErrorBody}})


@router.get("/v1/models/count", summary="How many models there are", response_model=CountAnswer)
@router.get("/api/v1/models/count", include_in_schema=False)
async def count_models(request: Request) -> Response:
    runtime: Runtime = await request.app.state.runtime.ready()
    index = await runtime.catalog(shown_environment(request)).models()
    return Reply(CountAnswer(data={"count": len(index.raw)}))


@router.get(
    "/v1/models/{author}/{slug}/endpoints",
    summary="The providers of a model, with their prices",
    responses={
        200: {
            "content": {"application/json": {"example": {"data": {"id": "openai/gpt-4o-mini", "endpoints": [{"provider_name": "OpenAI"}]}}}}
        },
        404: {"model": ErrorBody},
    },
)
@router.get("/api/v1/models/{author}/{slug}/endpoints", include_in_schema=False)
async def list_endpoints(request: Request, author: str, slug: str) -> Response:
    """As the upstream has it, at most five minutes old."""
    runtime: Runtime = await request.app.state.runtime.ready()
    environment, model_id = shown_environment(request), f"{author}/{slug}"
    index = await runtime.catalog(environment).models()
    found = None if index.get(model_id) is None else await runtime.endpoint_lists(environment).get(model_id)
    if found is None:
        raise ModelNotFound(f"The model `{model_id[:256]}` does not exist. GET /v1/models lists those that do.", param="slug")
    return Response(found, media_type="application/json")
