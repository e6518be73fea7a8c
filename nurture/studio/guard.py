"""Who may ask, and what a browser may do with the answers.

A server on this machine can be reached by every web page the user opens, so being local is no protection:

- another site's page may send requests here and open WebSockets: what comes with an `Origin` (or `Sec-Fetch-Site`) that
  is not this server is refused;
- another site's name may be made to point here (DNS rebinding): without a token only `Host`s that mean this machine
  are answered;
- without a token only this machine can connect at all (`server.serve`); with one, every request shows it, as
  `Authorization: Bearer TOKEN` or as the cookie that the link with `?token=` sets.

Answers forbid the browser to load or run anything from elsewhere, and pages to be framed.
"""

from __future__ import annotations

import hmac
import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nurture.studio.requests import Refused, error_response

LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]", "::1")

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """ASGI middleware that checks every request and marks every answer."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse, or pass on."""
        if scope["type"] == "websocket" and self._check(scope) is not None:
            await send(
                {"type": "websocket.close", "code": 1008}
            )  # before it is accepted: the client gets a 403
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                if "cache-control" not in headers:
                    headers["Cache-Control"] = "no-cache"
            await send(message)

        answer = self._check(scope)
        await (answer or self.app)(scope, receive, marked)

    def _check(self, scope: Scope) -> Response | None:
        """Return the answer to a request that does not get through, None for one that does."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.token is None and _without_port(host) not in LOCAL_HOSTS:
            return _refuse(403, f"this server answers to localhost, not to '{host[:100]}'")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return _refuse(403, "requests from other sites are refused")
        fetched_from = headers.get("sec-fetch-site", "none")
        is_link = headers.get("sec-fetch-mode") == "navigate" and scope.get("method") == "GET"
        if fetched_from in ("cross-site", "same-site") and not is_link:
            return _refuse(403, "requests from other sites are refused")
        return None if self.token is None else self._check_token(scope, headers)

    def _check_token(self, scope: Scope, headers: Headers) -> Response | None:
        cookie = f"nurture_token_{(scope.get('server') or ('', 0))[1]}"
        query = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        given = dict(query).get("token")
        if given is not None and scope.get("method") == "GET" and self._is_token(given):
            rest = urlencode([pair for pair in query if pair[0] != "token"])
            path = "/" + scope["path"].lstrip("/\\")  # never //elsewhere
            answer = RedirectResponse(path + (f"?{rest}" if rest else ""), 303)
            answer.set_cookie(cookie, given, httponly=True, samesite="strict", max_age=30 * 86_400)
            return answer
        kind, _, shown = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._is_token(shown.strip()):
            return None
        if self._is_token(_cookies(headers).get(cookie, "")):
            return None
        return _refuse(
            401, "this server wants its token: open the link it printed, or send Authorization: Bearer TOKEN"
        )

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), (self.token or "").encode("utf-8"))


def token_for(host: str, token: str | None) -> str | None:
    """Return the token that clients must show: the given one, or a new one where an address needs one."""
    return secrets.token_urlsafe(24) if token is None and host not in LOCAL_HOSTS else token


def _without_port(host: str) -> str:
    return host.rsplit(":", 1)[0] if host.rpartition(":")[2].isdigit() else host


def _cookies(headers: Headers) -> dict[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(headers.get("cookie", "")).items()}
    except CookieError:
        return {}


def _refuse(status: int, message: str) -> Response:
    return error_response(Refused(message, status=status))
