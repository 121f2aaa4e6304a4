"""The server of one model: a page to type into, and OpenAI's completions.

A request reads and runs nothing: it is a prompt and some numbers. The model answers one request at a time, a token at a time,
so that a client that has gone, or a request that takes too long, ends at the next token.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from importlib import resources
from typing import Any

from anyio import to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from gpt2_jax.serving.request import CompletionRequest, Limits, RequestError, read_request
from gpt2_jax.serving.texts import Piece, ServedModel, check_length, pieces

LOOPBACK = ("127.0.0.1", "localhost")
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


class Server:
    """The application, and the model's queue."""

    def __init__(self, model: ServedModel, limits: Limits):
        self.model, self.limits = model, limits
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._started = int(time.time())

    async def page(self, request: Request) -> Response:
        html = (resources.files("gpt2_jax") / "assets" / "serve.html").read_text(encoding="utf-8")
        return HTMLResponse(html, headers=_PAGE_HEADERS)

    async def models(self, request: Request) -> Response:
        model = {"id": self.model.name, "object": "model", "created": self._started, "owned_by": "gpt2_jax"}
        longest = self.model.plan.config.max_sequence_length
        return JSONResponse({"object": "list", "data": [{**model, "max_model_len": longest}]})

    async def chat(self, request: Request) -> Response:
        raise RequestError(
            "chat: expected completions, as this model continues a text and knows no roles; use /v1/completions", status=404
        )

    async def completions(self, request: Request) -> Response:
        # A page of another origin cannot send this type without asking first, which nobody here answers.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("content-type: expected application/json", status=415)
        asked = read_request(await self._body(request), self.model.name, self.limits)
        answer = _Answer(asked, self.model.name, await to_thread.run_sync(check_length, self.model, asked))
        if asked.stream:
            stream = self._streamed(request, answer)
            first = await anext(stream)  # what is refused by now is refused with its status
            events = _joined(first, stream)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        async with aclosing(self._pieces(request, asked)) as found:
            async for piece in found:
                answer.add(piece)
        return JSONResponse(answer.whole())

    async def _body(self, request: Request) -> bytes:
        most = self.limits.body_bytes
        too_large = RequestError(f"body: expected at most {most:,} bytes, found more", status=413)
        if int(request.headers.get("content-length", 0)) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise RequestError(f"body: expected it within {self.limits.body_seconds:g} s", status=408) from None
        return bytes(body)

    async def _pieces(self, request: Request, asked: CompletionRequest) -> AsyncGenerator[Piece, None]:
        """The model's pieces, when it is this request's turn; no more of them when the client has gone."""
        async with self._model_for(request):
            end = time.monotonic() + self.limits.seconds
            seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
            found = pieces(self.model, asked, seed + 1)  # the generator of numbers has no seed 0
            while (piece := await to_thread.run_sync(next, found, None)) is not None:
                yield piece
                if await request.is_disconnected():
                    return
                if time.monotonic() > end:
                    raise RequestError(f"expected to be done within {self.limits.seconds:g} s; ask for less", status=503)

    @asynccontextmanager
    async def _model_for(self, request: Request) -> AsyncIterator[None]:
        if self._waiting >= self.limits.waiting:
            raise RequestError(f"expected at most {self.limits.waiting} requests at a time; try again later", status=429)
        self._waiting += 1
        try:
            try:
                async with asyncio.timeout(self.limits.seconds):
                    await self._turn.acquire()
            except TimeoutError:
                raise RequestError(f"expected the model to be free within {self.limits.seconds:g} s", status=503) from None
            try:
                yield
            finally:
                self._turn.release()
        finally:
            self._waiting -= 1

    async def _streamed(self, request: Request, answer: _Answer) -> AsyncGenerator[str, None]:
        """Server-sent events: a chunk for every piece, and '[DONE]'."""
        begun = False
        try:
            async with aclosing(self._pieces(request, answer.request)) as found:
                async for piece in found:
                    shown = answer.add(piece)
                    if shown or piece.finish or not begun:
                        yield _event(answer.chunk(piece.index, shown, piece.finish))
                        begun = True
        except RequestError as error:
            if not begun:
                raise
            yield _event(error.body())
            return
        if answer.request.include_usage:
            yield _event(answer.usage_chunk())
        yield "data: [DONE]\n\n"


class _Answer:
    """The answer to a request, as OpenAI's API writes it."""

    def __init__(self, request: CompletionRequest, model: str, prompt_tokens: int):
        self.request = request
        self._head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time())}
        self._head["model"] = model
        self._texts: list[str] = [""] * request.n
        self._finish: list[str | None] = [None] * request.n
        self._begun: set[int] = set()
        self._prompt_tokens, self._completion_tokens = prompt_tokens, 0

    def add(self, piece: Piece) -> str:
        """Note a piece; returns its text, in front of the first one the prompt if that is to be echoed."""
        text = piece.text
        if piece.index not in self._begun and self.request.echo:
            text = self.request.prompt + text
        self._begun.add(piece.index)
        self._texts[piece.index] += text
        self._finish[piece.index] = piece.finish
        self._completion_tokens += 1
        return text

    def whole(self) -> dict[str, Any]:
        choices = [_choice(index, text, self._finish[index]) for index, text in enumerate(self._texts)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def chunk(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        usage = {"usage": None} if self.request.include_usage else {}
        return {**self._head, "choices": [_choice(index, text, finish)], **usage}

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        prompt, completion = self._prompt_tokens, self._completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": None, "finish_reason": finish}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _joined(first: str, rest: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    async with aclosing(rest):
        yield first
        async for each in rest:
            yield each


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    # What was not read of the body would be taken for the next request.
    headers |= {"Connection": "close"} if error.status in (408, 413) else {}
    return JSONResponse(error.body(), error.status, headers=headers)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)


def application(model: ServedModel, limits: Limits, hosts: Sequence[str]) -> Starlette:
    """The ASGI application. `hosts` are the names by which it may be asked: a page of another site can give its own name the
    address of this machine, but not change the name that it asks for."""
    server = Server(model, limits)
    return Starlette(
        routes=[
            Route("/", server.page),
            Route("/v1/models", server.models),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={RequestError: _on_refusal, ClientDisconnect: _on_client_gone},
    )


def impatient_protocol(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which closes a connection whose request's head has not arrived within so many seconds; uvicorn's
    own limit is one on what comes between two requests."""

    class ImpatientProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_a_request()

        def data_received(self, data: bytes) -> None:
            if self._is_between_requests():
                self._expect_a_request()
            super().data_received(data)

        def _expect_a_request(self) -> None:
            if self._timer is None:
                self._timer = self.loop.call_later(seconds, self._close_without_request)

        def _close_without_request(self) -> None:
            self._timer = None
            if self._is_between_requests() and not self.transport.is_closing():
                self.transport.close()

        def _is_between_requests(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

    return ImpatientProtocol
