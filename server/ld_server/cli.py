"""`ld-server`: runs a study across hospitals."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.core.command import HOST_HELP, VERSION, Json, print_json, print_lines, run_cli
from ld_server.survey.commands import survey_app

HOME = typer.Argument(..., help="The study's folder, made by ld-server provision.")
RUN = typer.Argument(..., help="The study's folder, or the output folder of a simulation.")
SITE = typer.Argument(..., help="The site's name in the study.")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
app.add_typer(survey_app, name="survey")


@app.callback()
def describe(version: bool = VERSION) -> None:
    """Run a study across hospitals: provision it, admit its sites, serve it, train, release."""


@app.command()
def provision(
    study: Path = typer.Argument(..., help="The study's YAML file."),
    home: Path = typer.Option(..., help="Folder to make; its keys/ must stay secret."),
    settings: list[str] = typer.Argument(
        None,
        metavar="[KEY=VALUE]...",
        help="Addresses, such as hosts=[study.example.org] gate_port=9092, and values that replace the study's.",
    ),
) -> None:
    """Make a study's home: keys, certificates, code bundle, and a kit for each site."""
    from ld_common.protocol.study_config import load_study
    from ld_server.deployment.study_home import server_config

    server, overrides = server_config(settings or [])
    load_study(study, overrides)  # refuses typing errors before Flower is imported
    from ld_server.deployment import provision as provisioning

    made = provisioning.provision(study, home, server, overrides)
    if server.is_local:
        print_lines("hosts is not set: these kits work on this machine only")
    print_lines(f"wrote {made.path}", f"send each site its kit from {made.kits}; kits hold no secret")
    print_lines(f"tell each site the study's fingerprint by telephone: {provisioning.study_fingerprint(made)}")


@app.command()
def update(home: Path = HOME) -> None:
    """Make code bundle, kits and the server's certificate again, after study.yaml, hosts or the software changed."""
    from ld_server.deployment.study_home import StudyHome

    study = StudyHome(home.resolve()).check()
    from ld_server.deployment import provision as provisioning

    provisioning.update(study)
    print_lines(f"wrote {home / 'kits'}: each site opens its new kit with ld-client init and approves it")
    print_lines("restart ld-server start, which then serves the new certificate")


@app.command()
def admit(
    home: Path = HOME,
    site: str = SITE,
    key: str = typer.Argument(..., help="The line that ld-client enroll printed at the site."),
    replace: bool = typer.Option(False, "--replace", help="Revoke the site's former keys, for good."),
) -> None:
    """Admit a site with its public keys."""
    from ld_server.deployment.study_home import StudyHome

    study = StudyHome(home.resolve()).check()
    from ld_server.deployment import provision as provisioning

    admitted = provisioning.admit(study, site, key, replace)
    print_lines(f"{site} is admitted; compare by telephone: {admitted.keys.fingerprint}")


@app.command()
def revoke(home: Path = HOME, site: str = SITE) -> None:
    """Revoke a site at once."""
    from ld_server.deployment.study_home import StudyHome

    study = StudyHome(home.resolve()).check()
    from ld_server.deployment import provision as provisioning

    provisioning.revoke(study, site)
    print_lines(f"{site} is revoked: its node, its results and its certificate are refused from now on")


@app.command()
def start(home: Path = HOME) -> None:
    """Serve the study until terminated: Flower's SuperLink, the fleet proxy in front of it, the release service."""
    from ld_server.deployment.study_home import StudyHome

    study = StudyHome(home.resolve()).check()
    from ld_server.deployment.supervisor import serve

    serve(study)


@app.command()
def nginx(
    home: Path = HOME,
    sites_per_address: int = typer.Option(4, min=1, help="Sites that may share one address (NAT)."),
) -> None:
    """Print nginx's configuration for this study, the recommended front; server.yaml needs a proxy_port."""
    from ld_server.deployment.study_home import StudyHome

    study = StudyHome(home.resolve()).check()
    from ld_server.deployment.nginx import nginx_config

    print_lines(*nginx_config(study, sites_per_address).splitlines())


@app.command()
def run(
    home: Path = HOME, resume: bool = typer.Option(False, "--resume", help="Continue after the last checkpoint.")
) -> None:
    """Run the study's rounds at the connected hospitals and write its release."""
    from ld_server.deployment.study_home import StudyHome

    study = StudyHome(home.resolve()).check()
    from ld_server.tracking.tracking import check_trackers

    check_trackers(study.study()[0])
    from ld_server.deployment.run import run_deployed
    from ld_server.deployment.watched_run import round_line

    run_deployed(study, resume, lambda record: print_lines(round_line(record)))
    print_lines(f"wrote {study.run / 'release'}")


@app.command()
def status(
    home: Path = RUN,
    follow: bool = typer.Option(False, "--follow", help="Then print each round as it ends, until the run does."),
    as_json: Json = False,
) -> None:
    """Show the progress of the study, each site's last result, and which sites were left out why.

    --follow waits a minute for a run to begin, and goes on until Ctrl-C or the end of the run. With --json, each of its
    lines is an object: the status, each new round, and the status at the end.
    """
    from ld_server.deployment import watched_run as reading

    run = reading.WatchedRun.find(home)
    if not follow:
        report = run.status()
        return print_json(report) if as_json else print_lines(*report.lines())

    def show(entry: Any, lines: Sequence[str]) -> None:
        if as_json:
            print(json.dumps(asdict(entry), default=str), flush=True)
        else:
            print_lines(*lines)

    with contextlib.suppress(KeyboardInterrupt):
        reading.follow_status(run, show)
    return None


@app.command()
def page(
    home: Path = RUN,
    host: str = typer.Option("127.0.0.1", help=HOST_HELP),
    port: int = typer.Option(7870, min=1, max=65535, help="Port to listen on."),
) -> None:
    """Serve a read-only page of a run: its sites, rounds, losses and refusals.

    Example: ld-server page runs/demo
    """
    from ld_common.page.serve import serve_page
    from ld_server.deployment.page import RunPage

    serve_page(RunPage.of(home).render, host, port, "ld-server page", "what the study's people see")


@app.command()
def release(
    home: Path = HOME,
    to: list[str] = typer.Option([], "--to", help="Encrypt the adapter to this admitted site; can be repeated."),
    evaluation: Path | None = typer.Option(None, help="JSON file of results that the release's manifest includes."),
) -> None:
    """Sign the release of the study's run and offer it to the sites."""
    from ld_server.deployment.study_home import StudyHome

    StudyHome(home.resolve()).check()
    from ld_server.deployment.releases import run_release

    print_lines(*run_release(home.resolve(), to, evaluation))


def main() -> None:
    """The entry point `ld-server`; what it and its processes write, only its account can read."""
    os.umask(0o077)
    run_cli(app)


if __name__ == "__main__":
    main()
