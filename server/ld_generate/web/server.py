"""The page's server: it makes no outgoing connection and deletes its files at the end."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ld_common.core.errors import ConfigError
from ld_common.diffusion.base_model import BaseModel
from ld_common.page.token import PARAMETER, is_loopback, new_token
from ld_common.release.release import Release
from ld_generate.web.access import TokenGate
from ld_generate.web.appearance import CSS, NAME_PICTURES, theme
from ld_generate.web.layout import Page
from ld_generate.web.scans import Example

MAX_UPLOAD_BYTES = 128 * 2**20
"""Per dropped file."""


@contextmanager
def serving(
    model: BaseModel, release: Release, examples: Mapping[str, Example], host: str, port: int, strict: bool = False
) -> Iterator[str]:
    """Serve a release's page and yield its address with a fresh token; all its files are deleted at the end.

    A `strict` page refuses scans and attributes that the release's scans do not cover.

    Raises:
        ConfigError: the address is in use, or not one of this machine.
    """
    with tempfile.TemporaryDirectory(prefix="ld-page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        # Gradio sends itself a request when it starts, which a hospital's proxy would not route
        os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), "127.0.0.1", "localhost", host]))
        page, token = Page(model, release, examples, strict), new_token()
        try:
            _, address, _ = page.blocks.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                inline=False,
                inbrowser=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                run_history=False,
                enable_monitoring=False,
                show_error=False,
                footer_links=[],
                max_file_size=MAX_UPLOAD_BYTES,
                app_kwargs={"middleware": _middleware(host, port, token)},
                theme=theme(),
                css=CSS,
                js=NAME_PICTURES,
            )
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: choose another --port, or --host") from error
        try:
            yield f"{address}?{PARAMETER}={token}"
        finally:
            page.blocks.close(verbose=False)


def _middleware(host: str, port: int, token: str) -> list[Middleware]:
    """Ask for the token. On loopback, refuse other host names: a web site could point its own name at the page."""
    names = ["localhost", "127.0.0.1", "["]  # Starlette's host name of [::1]:7860
    hosts = [Middleware(TrustedHostMiddleware, allowed_hosts=names)] if is_loopback(host) else []
    return [*hosts, Middleware(TokenGate, token=token, port=port)]
