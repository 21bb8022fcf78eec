"""The AI gateway: composes the application out of its parts, and does nothing else.

Serve it with `make run`, or with `uvicorn app:app --no-proxy-headers`: by default uvicorn trusts
X-Forwarded-For from loopback.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from common.logs import configure_logging
from common.version import VERSION
from config import Configuration, Settings, load_configuration
from gateway.runtime.banner import print_welcome
from gateway.runtime.server import serve
from gateway.runtime.service import Service
from routes import proxy
from routes.http.error_handlers import HANDLERS
from routes.http.middleware import EXPOSED_HEADERS, Application, RequestLog
from routes.http.openapi import DESCRIPTION, add_documentation_page, document_proxy
from routes.public import UserCount
from routes.routers import ROUTERS


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    await service.start()
    print_welcome(service)
    try:
        yield
    finally:
        await service.aclose()


def create_app(configuration: Configuration) -> FastAPI:
    """The application for this configuration; nothing is opened before its lifespan begins."""
    settings = configuration.settings
    configure_logging(settings.log_level, settings.log_format)
    app = Application(
        title="AI Gateway",
        version=VERSION,
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        exception_handlers=dict(HANDLERS),
    )
    app.state.service = Service(configuration)
    app.state.user_count = UserCount()
    add_routes(app)
    add_layers(app, settings)
    return app


def add_routes(app: Application) -> None:
    for router in ROUTERS:
        # `include_router` would build every route once more, at the first request: a quarter of a second.
        app.router.routes.extend(router.routes)
    proxy.add_proxy_routes(app)
    document_proxy(app)
    add_documentation_page(app)


def add_layers(app: Application, settings: Settings) -> None:
    cors = partial(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        # With "*" a page of any origin could use a browser's credentials.
        allow_credentials="*" not in settings.cors_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=EXPOSED_HEADERS,
    )
    app.add_middleware(cors)
    limit = settings.max_body_bytes
    app.front = lambda inner: RequestLog(proxy.FastPath(inner), max_body_bytes=limit, cors=cors)


app = create_app(load_configuration())


if __name__ == "__main__":
    serve(app, app.state.service)
