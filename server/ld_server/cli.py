"""`ld-server`: what the people who run a study across hospitals type."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.core.command import run_cli

HOME = typer.Argument(..., help="The study's folder, made by ld-server provision.")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
console = Console()


@app.callback()
def describe() -> None:
    """The central side of a federation across hospitals: docs/deploy.md has the whole way."""


@app.command()
def provision(
    study: Path = typer.Argument(..., help="The study's YAML file."),
    home: Path = typer.Option(..., help="Folder to make; its keys/ must stay secret."),
    settings: list[str] = typer.Argument(
        None,
        metavar="[KEY=VALUE]...",
        help="Addresses, as hosts=[study.example.org] gate_port=9092, and values of the study's file to replace.",
    ),
) -> None:
    """Make a study's home: keys, certificates, code bundle, and a kit for each site."""
    from ld_server.deployment.provision import provision as make
    from ld_server.deployment.provision import server_config, study_fingerprint

    server, overrides = server_config(settings or [])
    made = make(study, home, server, overrides)
    if server.is_local:
        _say("hosts is not said: these kits are of use on this machine alone")
    _say(f"wrote {made.path}", f"send each site its file of {made.kits}: nothing in it is secret")
    _say(f"and tell it on another channel the study's fingerprint: {study_fingerprint(made)}")


@app.command()
def update(home: Path = HOME) -> None:
    """Make bundle, kits and the server's certificate anew, after study.yaml or hosts was edited or this was updated."""
    from ld_server.deployment.provision import update as renew
    from ld_server.deployment.study_home import StudyHome

    renew(StudyHome(home.resolve()))
    _say(f"wrote {home / 'kits'}: each site runs ld-client init with its new kit, and approves it")
    _say("and restart ld-server start: it serves the new certificate from then on")


@app.command()
def admit(
    home: Path = HOME,
    site: str = typer.Argument(..., help="The site's name in the study."),
    key: str = typer.Argument(..., help="The line that ld-client enroll printed there."),
    replace: bool = typer.Option(False, "--replace", help="In place of the site's former key, for good."),
) -> None:
    """Let a site in."""
    from ld_common.protocol.keys import fingerprint
    from ld_server.deployment.provision import admit as let_in
    from ld_server.deployment.study_home import StudyHome

    admitted = let_in(StudyHome(home.resolve()), site, key, replace)
    _say(f"{site} is admitted with key {fingerprint(admitted.key)}")


@app.command()
def revoke(home: Path = HOME, site: str = typer.Argument(..., help="The site's name in the study.")) -> None:
    """Shut a site out at once."""
    from ld_server.deployment.provision import revoke as shut_out
    from ld_server.deployment.study_home import StudyHome

    shut_out(StudyHome(home.resolve()), site)
    _say(f"{site} is revoked: its node, its replies and its certificate are refused from now on")


@app.command()
def start(home: Path = HOME) -> None:
    """Serve the study until told to end: Flower's SuperLink, the gate in front of it, the release service."""
    from ld_server.deployment.study_home import StudyHome
    from ld_server.deployment.supervisor import serve

    serve(StudyHome(home.resolve()))


@app.command()
def run(
    home: Path = HOME, resume: bool = typer.Option(False, "--resume", help="Go on from the last round's checkpoint.")
) -> None:
    """Run the study at the hospitals that are connected, to its release."""
    from ld_server.deployment.run import run_deployed
    from ld_server.deployment.study_home import StudyHome
    from ld_server.round_log import RoundRecord

    def show(record: RoundRecord) -> None:
        left = "".join(f"; left out {name}: {why}" for name, why in record.left_out.items())
        failed = f"; not counted: {record.failure}" if record.failure else ""
        _say(f"round {record.round} in {record.seconds:.0f} s: {', '.join(record.sites)}{left}{failed}")

    study = StudyHome(home.resolve())
    run_deployed(study, resume, show)
    _say(f"wrote {study.run / 'release'}")


@app.command()
def status(home: Path = HOME) -> None:
    """Show how far the study is, when each site was last heard of, what each sent, and what was refused."""
    from ld_server.deployment.status import status_lines
    from ld_server.deployment.study_home import StudyHome

    study = StudyHome(home.resolve()).check()
    _say(*status_lines(study.run, study.study()[0], study.sites()))


@app.command()
def release(
    home: Path = HOME,
    to: list[str] = typer.Option([], "--to", help="Encrypt the adapter to this admitted site; can be repeated."),
    evaluation: Path | None = typer.Option(None, help="A JSON file of numbers that the release is to carry."),
) -> None:
    """Sign what the study made, and offer it to its sites."""
    from ld_server.deployment.releases import run_release

    _say(*run_release(home.resolve(), to, evaluation))


def _say(*lines: str) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def main() -> None:
    """The entry point `ld-server`."""
    run_cli(app)


if __name__ == "__main__":
    main()
