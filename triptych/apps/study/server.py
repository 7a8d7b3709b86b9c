"""The voting page over HTTP: one page, ballots, votes, pictures. Nothing of it tells which system is which.

It is a FastAPI application under uvicorn (extra `serve`): bodies are checked, slow and broken clients cost
nothing, and many voters at once are its daily work, which the standard library's server does not promise.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from importlib.resources import files
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from triptych.errors import MissingExtra, RequestError
from triptych.evaluation.ballots import Answer, Ballot, Poll
from triptych.evaluation.shown import shown_png

SECURITY = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
PICTURES_KEPT = 256


class Asked(BaseModel):
    """Who wants a ballot."""

    model_config = ConfigDict(extra="forbid")

    voter: str = Field(min_length=8, max_length=64)


class Voted(Asked):
    """An answer to a ballot."""

    ballot: str = Field(max_length=64)
    answer: Answer
    milliseconds: int = Field(0, ge=0, le=86_400_000)


def study_app(poll: Poll) -> Any:
    """The application that serves `poll`. Raises MissingExtra without FastAPI."""
    try:
        from fastapi import FastAPI
        from fastapi.responses import HTMLResponse, JSONResponse, Response
    except ImportError:
        raise MissingExtra("fastapi", "serve", "The voting page") from None

    app = FastAPI(title="triptych study", docs_url=None, redoc_url=None, openapi_url=None)
    page = (files("triptych.apps.study") / "page.html").read_text(encoding="utf-8")

    @lru_cache(PICTURES_KEPT)
    def picture_bytes(token: str) -> bytes | None:
        found = poll.picture(token)
        return None if found is None else shown_png(*found)

    def refused(message: str) -> JSONResponse:
        return JSONResponse({"error": message}, status_code=400)

    @app.get("/", response_class=HTMLResponse)
    def show_page() -> Any:
        return HTMLResponse(page, headers={**SECURITY, "Cache-Control": "no-store"})

    @app.post("/api/ballot")
    def next_ballot(asked: Asked) -> Any:
        try:
            return told(poll.ballot(asked.voter))
        except RequestError as error:
            return refused(str(error))

    @app.post("/api/vote")
    def vote(voted: Voted) -> Any:
        try:
            poll.vote(voted.voter, voted.ballot, voted.answer, voted.milliseconds)
            return told(poll.ballot(voted.voter))
        except RequestError as error:
            return refused(str(error))

    @app.get("/picture/{token}.png")
    def picture(token: str) -> Any:
        content = picture_bytes(token)
        if content is None:
            return Response(status_code=404)
        kept = {"Cache-Control": "private, max-age=86400, immutable", **SECURITY}
        return Response(content, media_type="image/png", headers=kept)

    return app


def told(ballot: Ballot | None) -> dict[str, Any]:
    """A ballot as the page reads it; `ballot` is null when there is nothing left to ask."""
    return {"ballot": None if ballot is None else asdict(ballot)}


def serve(poll: Poll, host: str, port: int) -> None:
    """Serve until interrupted."""
    app = study_app(poll)
    import uvicorn

    uvicorn.run(app, host=host, port=port, log_level="warning")
