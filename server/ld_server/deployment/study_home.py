"""A deployed study's folder at the server.

server.yaml              addresses (ServerConfig)
study.yaml modality.yaml the study
bundle.fab packages.json the code that every site runs, and the packages of others that it needs
keys/                    authority.key server.key study.key, mode 0600
certificates/            authority.crt server.crt, and sites/SITE.crt for each admitted site
kits/                    SITE.kit for each site; they hold no secret
sites.json               admitted and revoked sites with their keys
run/                     checkpoint, log of the rounds, release
"""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import functools
import ipaddress
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ld_common.core.atomic_files import write_bytes
from ld_common.core.config import load_config, require
from ld_common.core.errors import DeploymentError, SignatureError
from ld_common.imaging.modality import Modality
from ld_common.protocol.keys import (
    PrivateKey,
    read_elliptic_key,
    read_private_key,
    read_signing_key,
)
from ld_common.protocol.site_keys import SiteKeys
from ld_common.protocol.study_config import StudyConfig, load_study

HOST_NAME = re.compile(
    r"(?=.{1,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*(?!\d+$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
)
"""In lower case and ASCII; the last label must not be a number, as in an incomplete IP address."""


@dataclass
class ServerConfig:
    """Where a study's server listens."""

    hosts: list[str] = field(default_factory=lambda: ["localhost", "127.0.0.1"])
    """Host names and IP addresses at which sites reach the server, without a port; kits hold the first one."""
    bind: str = "0.0.0.0"
    """Address on which the fleet proxy and the release service listen."""
    gate_port: int = 9092
    """Port that sites connect to: of the fleet proxy, or of nginx in front of it."""
    release_port: int = 9093
    """Port of the gRPC release service."""
    link_port: int = 9091
    """Port of Flower's SuperLink, on loopback only."""
    proxy_port: int = 0
    """Port of the fleet proxy on loopback, behind nginx (ld-server nginx); 0 where there is no nginx."""

    def __post_init__(self) -> None:
        require(bool(self.hosts), "hosts is empty: name the server as sites reach it")
        self.hosts = [host_in_ascii(host) for host in self.hosts]
        ports = [self.gate_port, self.release_port, self.link_port, *([self.proxy_port] if self.proxy_port else [])]
        require(all(0 < port < 65536 for port in ports), f"ports are {ports}: use 1 to 65535")
        require(len(set(ports)) == len(ports), f"ports are {ports}: use different ones")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return set(self.hosts) <= {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True)
class AdmittedSite:
    """A site of the allow-list."""

    name: str
    keys: SiteKeys
    admitted: str
    """ISO 8601, UTC."""
    revoked: str | None = None
    """Time of its revocation, or None."""


@dataclass(frozen=True)
class StudyHome:
    """The folder of a provisioned study."""

    path: Path

    @property
    def keys(self) -> Path:
        """Folder of private keys."""
        return self.path / "keys"

    @property
    def certificates(self) -> Path:
        """Folder of certificates."""
        return self.path / "certificates"

    @property
    def kits(self) -> Path:
        """Folder of site kits."""
        return self.path / "kits"

    @property
    def bundle(self) -> Path:
        """The code bundle."""
        return self.path / "bundle.fab"

    @property
    def run(self) -> Path:
        """Folder of checkpoint, rounds and release."""
        return self.path / "run"

    @property
    def registry(self) -> Path:
        """The list of sites."""
        return self.path / "sites.json"

    def check(self) -> StudyHome:
        """This home; raises `DeploymentError` when nobody provisioned it."""
        if not self.registry.exists():
            raise DeploymentError(f"'{self.path}' is not a study's home: make it with ld-server provision")
        return self

    def study(self) -> tuple[StudyConfig, Modality]:
        """The study, whose output is this home's run folder, and its modality."""
        study, modality = load_study(self.path / "study.yaml")
        return dataclasses.replace(study, output=str(self.run)), modality

    def server(self) -> ServerConfig:
        """Where it listens."""
        return load_config(ServerConfig, self.path / "server.yaml")

    def key(self, name: str) -> PrivateKey:
        """`authority`, `server` or `study`; raises `SignatureError`."""
        return read_private_key(self.keys / f"{name}.key")

    def study_key(self) -> Ed25519PrivateKey:
        """The key that signs kits and releases; raises `SignatureError`."""
        return read_signing_key(self.keys / "study.key")

    def authority(self) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        """The certificate authority; raises `SignatureError`."""
        key = read_elliptic_key(self.keys / "authority.key")
        return key, x509.load_pem_x509_certificate(self.certificate("authority").read_bytes())

    def certificate(self, name: str) -> Path:
        """The file of `authority`'s or `server`'s certificate."""
        return self.certificates / f"{name}.crt"

    def site_certificate(self, name: str) -> Path:
        """The file of a site's certificate, in a separate folder, as a site may be called `authority`."""
        return self.certificates / "sites" / f"{name}.crt"

    def sites(self) -> dict[str, AdmittedSite]:
        """All sites that were ever admitted, by name; raises `DeploymentError`.

        A round asks for them once a site, so a list that did not change is not read again.
        """
        try:
            written = self.registry.stat()
            return dict(_read_sites(self.registry, (written.st_ino, written.st_mtime_ns, written.st_size)))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SignatureError) as error:
            raise DeploymentError(f"cannot read the list of sites '{self.registry}': restore it") from error

    @contextmanager
    def editing(self) -> Iterator[dict[str, AdmittedSite]]:
        """The sites, to be changed in the block and then written back; one process at a time."""
        with (self.path / "sites.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            sites = self.sites()
            yield sites
            self.write_sites(sites)

    def write_sites(self, sites: dict[str, AdmittedSite]) -> None:
        """Replace the list of sites."""
        content = {name: dataclasses.asdict(site) for name, site in sorted(sites.items())}
        for entry in content.values():
            entry.pop("name")
        write_bytes(self.registry, (json.dumps(content, indent=2) + "\n").encode())


@functools.lru_cache(maxsize=8)
def _read_sites(registry: Path, version: tuple[int, int, int]) -> dict[str, AdmittedSite]:
    """The sites of a list; `version` tells the file from those that stood there before."""
    return {
        name: AdmittedSite(name=name, **entry | {"keys": SiteKeys(**entry["keys"])})
        for name, entry in sorted(json.loads(registry.read_text()).items())
    }


def host_in_ascii(host: str) -> str:
    """A host as certificates and kits hold it: an IP address, or a name with its labels in IDNA's ASCII form.

    Raises:
        ConfigError: neither of them; one with a port, an adapter or a path, for instance.
    """
    with suppress(ValueError):
        return str(ipaddress.ip_address(host))
    name = host.lower() if host.isascii() else ""
    with suppress(UnicodeError):
        encoded = host.encode("idna")
        # Python implements IDNA 2003, which turns ß into ss: another host's name
        if not name and encoded.decode("idna") == host.lower():
            name = encoded.decode()
    hint = "" if host.isascii() else ", in its ASCII form (xn--...)"
    require(
        HOST_NAME.fullmatch(name) is not None,
        f"hosts has '{host}': write a host's name{hint} or an IP address, without a port or anything else",
    )
    return name


def address(host: str, port: int) -> str:
    """`host:port`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def now() -> str:
    """The time as the home writes it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def server_config(settings: Sequence[str]) -> tuple[ServerConfig, list[str]]:
    """Split `key=value` settings into the server's config and overrides of the study; raises `ConfigError`."""
    names = {entry.name for entry in dataclasses.fields(ServerConfig)}
    addresses = [text for text in settings if text.split("=")[0] in names]
    addresses = [
        f"hosts=[{text.removeprefix('hosts=')}]" if text.startswith("hosts=") and "[" not in text else text
        for text in addresses
    ]
    overrides = [text for text in settings if text.split("=")[0] not in names]
    return load_config(ServerConfig, None, addresses), overrides
