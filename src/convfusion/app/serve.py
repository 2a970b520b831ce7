"""The page on this machine alone: no other can reach it, and it reaches no other."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Any

from convfusion.app.studio import Studio
from convfusion.app.style import CODE_FONTS, CSS, FONTS
from convfusion.errors import ConvFusionError
from convfusion.quiet import keep_quiet

HOST = "127.0.0.1"
PORT = 7860

# What a browser may load for this page: what comes from here, and nothing else.
POLICY = "; ".join(
    (
        "default-src 'self' data: blob:",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "frame-ancestors 'none'",
        "form-action 'self'",
    )
)


def check_port(port: int) -> None:
    """Raise a ConvFusionError unless a port of this machine is free."""
    if not 0 < port < 2**16:
        raise ConvFusionError(f"a port lies between 1 and {2**16 - 1}, not at {port}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConvFusionError(
                f"the port {port} of {HOST} cannot be used ({error.strerror}): choose another one "
                "with --port"
            ) from None


def serve(
    studio: Studio,
    *,
    port: int = PORT,
    prompt: str = "",
    on_ready: Callable[[str], None] = print,
) -> None:
    """Serve the page until the process is interrupted.

    Args:
        studio: what it draws with.
        port: of 127.0.0.1.
        prompt: that is in the field at first.
        on_ready: called with the address, once the page is there.

    Raises:
        ConvFusionError: the port is taken.
    """
    check_port(port)
    with tempfile.TemporaryDirectory(prefix="convfusion-app-") as pictures:
        keep_quiet()
        os.environ["GRADIO_TEMP_DIR"] = pictures
        page = launch(studio, port, prompt)
        try:
            on_ready(f"http://{HOST}:{port}")
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:  # the way to end it
            page.close(verbose=False)


def launch(studio: Studio, port: int, prompt: str) -> Any:
    """Start the server in a thread, and return its page."""
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from convfusion.app.page import build_page

    page = build_page(studio, prompt)
    page.queue(max_size=32)
    page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        root_path="",
        theme=gr.themes.Default(font=FONTS, font_mono=CODE_FONTS),
        css=CSS,
        app_kwargs={
            "middleware": [
                # A name that somebody else's page gives to this address is not answered.
                Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
                Middleware(AddedPolicy),
            ]
        },
    )
    return page


class AddedPolicy:
    """Tells the browser, with every answer, that nothing of the page lies on another host."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                referrer = (b"referrer-policy", b"no-referrer")
                message = {**message, "headers": [*message["headers"], policy, referrer]}
            await send(message)

        await self.app(scope, receive, send_with_policy)
