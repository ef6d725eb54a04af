"""A site's connection to the study's release service over mutual TLS."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from cryptography.hazmat.primitives.serialization import Encoding
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import BytesValue, StringValue

from ld_client.deployment.site_certificate import check_valid_now, read_certificate
from ld_client.deployment.site_home import SiteHome
from ld_common.core.errors import DeploymentError, LdError, ReleaseError
from ld_common.protocol.enrollment_kit import AUTHORITY, KitManifest
from ld_common.protocol.keys import private_pem
from ld_common.release.service_messages import (
    FETCH,
    LIST,
    MANIFEST_OF,
    MAX_MESSAGE_BYTES,
    MAX_REQUEST_BYTES,
    FileRequest,
    Listed,
    file_request,
    method,
    parser,
    read_listing,
    serialize,
)

ANSWER_SECONDS, FILE_SECONDS = 30.0, 3600.0
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_REQUEST_BYTES),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.enable_http_proxy", 0),
)


class ReleaseClient:
    """A client of the release service; every failure is a `DeploymentError` or a `ReleaseError`."""

    def __init__(self, home: SiteHome, kit: KitManifest) -> None:
        self._home, self._kit = home, kit
        self._channel: Any = None

    @contextmanager
    def connected(self) -> Iterator[ReleaseClient]:
        """Open the connection; raises `DeploymentError` when the site's certificate cannot be used."""
        certificate = read_certificate(self._home)
        check_valid_now(self._home, certificate)
        key = private_pem(self._home.key("certificate"))
        authority = (self._home.kit_folder / AUTHORITY).read_bytes()
        credentials = grpc.ssl_channel_credentials(authority, key, certificate.public_bytes(Encoding.PEM))
        with grpc.secure_channel(self._kit.release_service, credentials, options=OPTIONS) as self._channel:
            yield self

    def list(self) -> list[Listed]:
        """The releases that the server offers."""
        answer = self._ask(LIST, Empty(), Struct)
        try:
            return read_listing(answer)
        except ValueError as error:
            raise self._unexpected() from error

    def manifest(self, name: str) -> bytes:
        """A release's manifest, unchecked."""
        return bytes(self._ask(MANIFEST_OF, StringValue(value=name), BytesValue).value)

    def fetch(self, release: str, file: str, offset: int) -> Iterator[bytes]:
        """The chunks of a file, from byte `offset` on."""
        call = self._channel.unary_stream(method(FETCH), serialize, parser(BytesValue))
        stream = call(file_request(FileRequest(release, file, offset)), timeout=FILE_SECONDS)
        try:
            for part in stream:
                yield part.value
        except grpc.RpcError as error:
            raise self._failure(error) from error
        finally:
            stream.cancel()

    def _ask(self, name: str, request: Message, answer: type[Any]) -> Any:
        call = self._channel.unary_unary(method(name), serialize, parser(answer))
        try:
            return call(request, timeout=ANSWER_SECONDS)
        except grpc.RpcError as error:
            raise self._failure(error) from error

    def _unexpected(self) -> DeploymentError:
        return DeploymentError(
            f"{self._kit.release_service} does not answer as a release service does: it may be of another version"
        )

    def _failure(self, error: Any) -> LdError:
        """The error of a failed call; only the text of our own service is passed on."""
        code, address = error.code(), self._kit.release_service
        details = " ".join(str(error.details() or "").split())[:200]
        details = "".join(letter for letter in details if letter.isprintable())
        refused = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
        if code in refused:
            return DeploymentError(f"the study's server refuses this site: {details}")
        if code == grpc.StatusCode.NOT_FOUND:
            return ReleaseError(f"the study's server does not have it: {details}")
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            return DeploymentError(f"a message is too large, or the study's server is busy: {details}")
        if code == grpc.StatusCode.UNAVAILABLE and "handshake failed" in details.lower():
            return DeploymentError(
                f"{address} is not this study's server: the study's authority did not sign its certificate, or not for "
                "that name; ask the study"
            )
        if code == grpc.StatusCode.UNAVAILABLE:
            return DeploymentError(
                f"no connection to {address}, or it broke: the server is down, or does not accept this site's "
                "certificate; pull again later to continue"
            )
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeploymentError(f"{address} took too long: pull again later to continue")
        if code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE):
            return self._unexpected()
        return DeploymentError(f"{address} failed ({code.name.lower()}): tell the study")
