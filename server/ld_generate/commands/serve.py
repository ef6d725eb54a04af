"""`ld-generate serve`: a local web page of one release."""

from __future__ import annotations

import importlib.util
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ld_common.core.command import HOST_HELP, loading
from ld_common.core.errors import ConfigError
from ld_common.page.token import is_loopback, warning_beyond_loopback
from ld_generate.console import print_note, status
from ld_generate.options import LoadOptions, Strict


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """Where the page is, and which scans it offers."""

    examples: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of scans to pick from; a scans.csv in it, with a column input and attributes, fills those in.",
            show_default=False,
        ),
    ] = None
    host: Annotated[str, typer.Option(help=HOST_HELP)] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860
    strict: Strict = False

    def __post_init__(self) -> None:
        if self.examples is not None and not self.examples.is_dir():
            raise ConfigError(f"--examples '{self.examples}' is not a folder: give a folder with scans in it")


def serve(load_options: LoadOptions, options: PageOptions) -> None:
    """Serve a local web page: drop a scan, set what should change, see and download the counterfactual.

    The page loads nothing from the network. Files are deleted half an hour after their last use.

    Example: ld-generate serve RELEASE --examples scans/
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the page needs gradio: pip install 'latent-drift-generate[page]'")
    with loading(status):
        from ld_generate.loading import load_model, open_release
        from ld_generate.web.scans import find_examples
        from ld_generate.web.server import serving  # needs the extra that was looked for above

    release = open_release(load_options)
    examples = {} if options.examples is None else find_examples(options.examples, release.modality)
    model = load_model(release, load_options)
    if not is_loopback(options.host):
        print_note(warning_beyond_loopback(options.host, "the scans"))
    with serving(model, release, examples, options.host, options.port, options.strict) as address:
        for name, example in examples.items():
            print(f"{name}: {example.path}")
        print(f"the page is at {address} until Ctrl-C; its token lets nobody else in", flush=True)
        threading.Event().wait()
