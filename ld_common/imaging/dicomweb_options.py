"""How a PACS is reached over DICOMweb: options of the commands that talk to one, checked before anything is sent."""

from __future__ import annotations

import ipaddress
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from ld_common.core.config import require
from ld_common.core.errors import ConfigError

PASSWORD = "LD_PACS_PASSWORD"
PANEL = "PACS"
MAX_PASSWORD_BYTES = 4096


@dataclass(frozen=True)
class PacsAccess:
    """A DICOMweb service, and who asks it."""

    url: str
    """Of the service, without a slash at its end: `https://pacs.example/dicom-web`."""
    ca: Path | None = None
    certificate: tuple[Path, Path] | None = None
    """The client's certificate and key, PEM."""
    login: tuple[str, str] | None = field(default=None, repr=False)
    """User and password."""
    timeout_s: float = 60.0

    @property
    def host(self) -> str:
        """Host and port, for messages."""
        return urlsplit(self.url).netloc


@dataclass(frozen=True, kw_only=True)
class PacsOptions:
    """TLS and login of a DICOMweb service."""

    ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="PEM file of the authorities that may have signed the PACS's certificate. By default the public ones.",
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None
    cert: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="PEM file of this machine's certificate, for a PACS that asks for one; with --key.",
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None
    key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PEM file of the key of --cert.", show_default=False, rich_help_panel=PANEL),
    ] = None
    user: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"User of the PACS. The password comes from --password-file or the environment variable {PASSWORD}.",
            rich_help_panel=PANEL,
        ),
    ] = ""
    password_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with the password alone, which only its owner can read.",
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None
    timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Longest wait for an answer of the PACS.", rich_help_panel=PANEL),
    ] = 60.0

    def __post_init__(self) -> None:
        for name, file in (("ca", self.ca), ("cert", self.cert), ("key", self.key)):
            require(file is None or file.is_file(), f"--{name} '{file}' is not a file: give a PEM file")
        require((self.cert is None) == (self.key is None), "--cert and --key belong together: give both or neither")
        require(bool(self.user) or self.password_file is None, "--password-file needs --user NAME")
        require(":" not in self.user, f"--user '{self.user}' has a colon, which basic authentication does not allow")
        require(0 < self.timeout < 86400, f"--timeout is {self.timeout}: give seconds, above 0 and below a day")

    def access(self, url: str) -> PacsAccess:
        """The service at `url` with these options.

        Raises:
            ConfigError: the address is not one of a DICOMweb service, would send patients in clear text to another
                machine, or the password is missing or readable by others.
        """
        certificate = None if self.cert is None or self.key is None else (self.cert, self.key)
        return PacsAccess(check_address(url), self.ca, certificate, self._login(), self.timeout)

    def _login(self) -> tuple[str, str] | None:
        if not self.user:
            return None
        if self.password_file is not None:
            return self.user, read_password(self.password_file)
        password = os.environ.get(PASSWORD, "")
        require(bool(password), f"--user needs a password: give --password-file FILE, or set {PASSWORD}")
        return self.user, password


def check_address(url: str) -> str:
    """The address of a DICOMweb service without its last slash; raises `ConfigError` for one that must not be used."""
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"'{url}' is not an address: give one such as https://pacs.example/dicom-web") from error
    if parts.username is not None or parts.password is not None:
        raise ConfigError("the PACS's address holds a user or a password, which others can read: use --user NAME")
    usable = parts.scheme in ("http", "https") and host and not parts.query and not parts.fragment
    if not usable or any(not sign.isprintable() or sign.isspace() for sign in url.strip()):
        raise ConfigError(f"'{url}' is not an address of DICOMweb: give one such as https://pacs.example/dicom-web")
    if parts.scheme == "http" and not is_this_machine(host or ""):
        raise ConfigError(
            f"'{url}' would send patients and passwords over the network in clear text: use https, or a tunnel to the "
            "PACS (ssh -L 8042:localhost:8042 PACS) and http://localhost:8042"
        )
    return url.strip().rstrip("/")


def is_this_machine(host: str) -> bool:
    """Whether a host name is of loopback, which no other machine can listen to."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_password(path: Path) -> str:
    """The password in a file; raises `ConfigError` where others than its owner can read it, or it is not one line."""
    try:
        with path.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            content = stream.read(MAX_PASSWORD_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read --password-file '{path}': {error.strerror or error}") from error
    others = stat.S_IMODE(mode) & 0o077
    require(not others, f"others can read --password-file '{path}': run chmod 600 on it, and change the password")
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError:
        lines = []
    one_line = len(lines) == 1 and bool(lines[0]) and len(content) <= MAX_PASSWORD_BYTES
    require(one_line, f"--password-file '{path}' is not one line of text: write the password alone")
    return lines[0]
