"""`ld-generate serve`: a local page for one release."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path

import typer
from rich.console import Console

from ld_common.core.command import TRUST_HELP, UNSIGNED_HELP, loading
from ld_common.core.errors import ConfigError

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()


@cli.callback()
def generate() -> None:
    """Counterfactuals of scans."""


@cli.command()
def serve(
    release: Path = typer.Option(..., help="Folder of a release."),
    examples: Path | None = typer.Option(None, help="Folder of scans to pick from."),
    host: str = typer.Option("127.0.0.1", help="Address to listen on. Any but loopback lets others in."),
    port: int = typer.Option(7860, min=1, max=65535, help="Port to listen on."),
    base: str | None = typer.Option(None, help="Base model, if not where the release says."),
    trust: str = typer.Option("", help=TRUST_HELP),
    allow_unsigned: bool = typer.Option(False, "--allow-unsigned", help=UNSIGNED_HELP),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    precision: str = typer.Option("float32", help="float32, bfloat16 or float16."),
) -> None:
    """Serve a local web page: drop a scan, say what should be different, see and download the answer.

    Nothing is fetched from the network, and what was dropped or drawn is deleted half an hour after its last use.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the page needs gradio: pip install 'latent-drift-federation[page]'")
    with loading(console):
        from ld_common.release.release import load_release_base
        from ld_common.release.trusted_keys import read_trusted_release
        from ld_generate.web.scans import find_examples
        from ld_generate.web.server import is_loopback, serving  # needs the extra that was looked for above

    loaded, notes = read_trusted_release(release, trust, allow_unsigned)
    found = {} if examples is None else find_examples(examples, loaded.modality)
    model = load_release_base(loaded, base, device, precision)
    if not is_loopback(host):
        notes.append(f"warning: on {host} others can reach this page: it asks for no password and encrypts nothing")
    with serving(model, loaded, found, host, port) as address:
        for line in (*notes, f"the page is at {address} until Ctrl-C"):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        threading.Event().wait()
