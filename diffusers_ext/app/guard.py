"""Who may ask the app: what comes from this machine, and no page whose own name points to it (DNS rebinding)."""

import re
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

HERE = ("localhost", "127.0.0.1", "[::1]")
UPLOADS = ("upload", "upload_progress", "process_recording")  # gradio's routes for files, which no tab takes


def host_of(value: str) -> str | None:
    """The name in a Host or Origin header, in lower case without scheme and port; None where there is none."""
    found = re.fullmatch(r"(?:https?://)?(\[[0-9a-f:.]+\]|[^\s\[\]:/@?#]+)(?::\d*)?", value.lower())
    return found and found[1]


class Guard:
    """ASGI middleware that refuses requests by their Host and Origin, WebSockets too, and all uploads.

    hosts: names beside those of this machine, such as a proxy's.

    Raises:
        ValueError: for one that is no name.
    """

    def __init__(self, app: ASGIApp | None, hosts: Iterable[str] = ()):
        self.app, self.hosts = app, set(HERE)
        for host in hosts:
            if host_of(host) is None:
                raise ValueError(f"allowed hosts must be names such as app.example.org, got {host!r}")
            self.hosts.add(host_of(host))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is refused, and hand on any other."""
        reason = self.refusal(scope) if scope["type"] in ("http", "websocket") else None
        if reason is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http" or "websocket.http.response" in scope.get("extensions", {}):
            await PlainTextResponse(reason + "\n", 403)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def refusal(self, scope: Scope) -> str | None:
        """Why a request is refused; None where it is not."""
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not {host_of(value) for value in hosts + origins} <= self.hosts:
            return "this app is for its own machine alone; start it with --allow-host NAME to reach it by another name"
        if scope["path"].rstrip("/").rsplit("/", 1)[-1] in UPLOADS:
            return "this app takes no files"
        return None
