"""What stands before the gateway's app and the chat page: who may send, and how slowly."""

import asyncio
from re import Pattern

import h11
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from deploy.serving.limits import Refusal, is_loopback


class Guard:
    """ASGI middleware before every address, there or not. Only `paths` are open (None: all).

    A web page can point its own domain at 127.0.0.1 (DNS rebinding): its `Host` gives it away,
    unless `any_host` may ask. Starlette's TrustedHostMiddleware knows names, not 127.0.0.0/8.
    """

    def __init__(self, app: ASGIApp, any_host: bool = False, paths: Pattern | None = None):
        self.app, self.any_host, self.paths = app, any_host, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        try:
            if scope["type"] == "http":
                self.check(scope, Headers(scope=scope))
        except Refusal as refusal:
            app = JSONResponse(refusal.body, refusal.status)
        await app(scope, receive, send)

    def check(self, scope: Scope, headers: Headers) -> None:
        """Raises: Refusal 403 (another host or site), 404 (not open)."""
        address, origin = headers.get("host", ""), headers.get("origin")
        name, _, port = address.rpartition(":")
        host = name if port.isdigit() else address
        if not self.any_host and not is_loopback(host):
            said = f"Without API keys only 127.0.0.1 and localhost are served, not {host[:80]!r}."
            raise Refusal(403, "unknown_host", said)
        # Browsers say for which site they send; programs say nothing. Another port is another site.
        site = headers.get("sec-fetch-site", "none")
        link = (scope["method"], scope["path"], headers.get("sec-fetch-dest"))
        foreign = site not in ("same-origin", "none") and link != ("GET", "/", "document")
        if foreign or (origin and origin.partition("://")[2] != address):
            said = f"A web page of another site ({(origin or site)[:80]}) may not ask here."
            raise Refusal(403, "cross_site", f"{said} Use a program, or this server's own page.")
        if self.paths and not self.paths.fullmatch(scope["path"]):
            raise Refusal(404, "not_found", "This address is not open.")


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP, whose time for an idle connection also runs before the first request, and is
    ended by nothing less than the whole headers of a request.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        end = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        self.timeout_keep_alive_task = end

    def _unset_keepalive_if_required(self) -> None:
        if self.conn.our_state in (h11.SEND_RESPONSE, h11.CLOSED, h11.ERROR):
            super()._unset_keepalive_if_required()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(None)  # with an error it would let the time run on


# Settings of both servers. Nobody needs WebSockets here.
SERVER = {"http": TimedProtocol, "ws": "none", "access_log": False, "timeout_keep_alive": 15}
