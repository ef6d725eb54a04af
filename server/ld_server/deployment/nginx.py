"""`ld-server nginx`: the configuration of nginx in front of a study."""

from __future__ import annotations

import re

import jinja2

from ld_common.core.errors import DeploymentError
from ld_server.deployment.study_home import StudyHome, address
from ld_server.deployment.superlink import LOOPBACK, link_address

PLAIN_PATH = re.compile(r"[A-Za-z0-9_./+@%=,~-]+")
"""Others would need quoting in nginx's language."""
CONNECTIONS_PER_SITE = 8
"""A node has about four."""
REQUESTS_PER_SITE = 20
"""A second."""
LARGE_PER_SITE, LARGE_IN_ALL = 2, 64
"""Requests of 10 MB or more at once, each up to 128 MiB on nginx's disk."""


def nginx_config(home: StudyHome, sites_per_address: int) -> str:
    """The text of `nginx.conf` for a study.

    Args:
        home: the study's.
        sites_per_address: how many sites may reach the server from one address (NAT), which the limits allow for.

    Raises:
        DeploymentError: `server.yaml` has no `proxy_port`, or the home's path has characters that nginx reads
            otherwise.
    """
    server = home.server()
    if not server.proxy_port:
        raise DeploymentError(
            f"'{home.path / 'server.yaml'}' has no proxy_port: add one, such as proxy_port: 9094, and start the server "
            "again; its own proxy then listens there, on loopback, and nginx on gate_port"
        )
    if not PLAIN_PATH.fullmatch(str(home.path)):
        raise DeploymentError(
            f"nginx cannot read the path '{home.path}': move the home to one without spaces or quotes"
        )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ld_server.deployment", "."), undefined=jinja2.StrictUndefined
    )
    return environment.get_template("nginx.conf.j2").render(
        home=home.path,
        sites=sites_per_address,
        rate=REQUESTS_PER_SITE * sites_per_address,
        connections=CONNECTIONS_PER_SITE * sites_per_address,
        large_per_address=LARGE_PER_SITE * sites_per_address,
        large=LARGE_IN_ALL,
        listen=address(server.bind, server.gate_port),
        link=link_address(home),
        proxy=address(LOOPBACK, server.proxy_port),
        certificate=home.certificate("server"),
        key=home.keys / "server.key",
        authority=home.certificate("authority"),
    )
