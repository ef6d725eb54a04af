"""The release service: admitted sites fetch the study's releases over gRPC with mutual TLS.

TLS accepts every certificate of the study's authority. Each call, and each chunk of a file, looks up the site's entry
again, so a revocation takes effect at once, also on open connections.
"""

from __future__ import annotations

import datetime
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import BytesValue, StringValue
from grpc_health.v1 import health, health_pb2

from ld_common.core.errors import DeploymentError, LdError
from ld_common.protocol.keys import public_line
from ld_common.release.release import MANIFEST
from ld_common.release.service_messages import (
    CHUNK_BYTES,
    FETCH,
    LIST,
    MANIFEST_OF,
    MAX_MESSAGE_BYTES,
    MAX_REQUEST_BYTES,
    SERVICE,
    listing,
    parser,
    read_file_request,
    serialize,
)
from ld_server.deployment.releases import list_releases, releases_folder
from ld_server.deployment.study_home import StudyHome

THREADS, CALLS_OF_A_SITE = 16, 4
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16_000),
    ("grpc.max_concurrent_streams", 2 * CALLS_OF_A_SITE),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    ("grpc.max_connection_idle_ms", 600_000),
    ("grpc.so_reuseport", 0),  # a port in use is an error
)
log = logging.getLogger(__name__)


class ServiceError(Exception):
    """A refused call: a status, and a sentence for the site."""

    def __init__(self, code: grpc.StatusCode, sentence: str) -> None:
        super().__init__(sentence)
        self.code, self.sentence = code, sentence


def start_release_service(home: StudyHome, address: str) -> grpc.Server:
    """Start serving a home's releases at `host:port`; returns the running server, to be stopped by the caller.

    Raises:
        DeploymentError: keys or certificates are missing, or the address is in use.
    """
    home.check()
    home.key("server")  # checks that others cannot read it
    try:
        credentials = grpc.ssl_server_credentials(
            [((home.keys / "server.key").read_bytes(), home.certificate("server").read_bytes())],
            root_certificates=home.certificate("authority").read_bytes(),
            require_client_auth=True,
        )
    except OSError as error:
        raise DeploymentError(f"cannot read '{error.filename}': make the home with ld-server provision") from error
    server = grpc.server(
        ThreadPoolExecutor(THREADS, thread_name_prefix="releases"),
        handlers=[_releases(home), _health()],
        interceptors=[Doorkeeper(home)],
        options=OPTIONS,
        maximum_concurrent_rpcs=THREADS,
    )
    try:
        bound = server.add_secure_port(address, credentials)
    except (RuntimeError, ValueError) as error:
        raise DeploymentError(f"cannot listen on {address}: choose another release_port in server.yaml") from error
    if not bound:
        raise DeploymentError(f"cannot listen on {address}: choose another release_port in server.yaml")
    server.start()
    return server


class Doorkeeper(grpc.ServerInterceptor):
    """Admits calls of the study's sites, a few at a time for each, and turns every failure into one sentence."""

    def __init__(self, home: StudyHome) -> None:
        self._home = home
        self._running: Counter[str] = Counter()
        self._lock = threading.Lock()

    def intercept_service(self, continuation: Callable[..., Any], handler_call_details: Any) -> Any:
        """Wrap a call's handler; None is an unknown method, which gRPC answers itself."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(handler.unary_stream), handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._single(handler.unary_unary), handler.request_deserializer, handler.response_serializer
        )

    def _single(self, answer: Callable[[Any, Any], Message]) -> Callable[[Any, Any], Any]:
        def admitted(request: Any, context: Any) -> Any:
            refusal = None
            try:
                with self._admit(context):
                    return answer(request, context)
            except ServiceError as error:
                refusal = error
            except Exception as error:
                refusal = _failure(error)
            return context.abort(refusal.code, refusal.sentence)

        return admitted

    def _stream(self, answer: Callable[[Any, Any], Iterator[Message]]) -> Callable[[Any, Any], Iterator[Any]]:
        def admitted(request: Any, context: Any) -> Iterator[Any]:
            refusal = None
            try:
                with self._admit(context):
                    for message in answer(request, context):
                        yield message
                        check_peer(self._home, context)
            except ServiceError as error:
                refusal = error
            except Exception as error:
                refusal = _failure(error)
            if refusal is not None:
                context.abort(refusal.code, refusal.sentence)

        return admitted

    @contextmanager
    def _admit(self, context: Any) -> Iterator[None]:
        site = check_peer(self._home, context)
        with self._lock:
            if self._running[site] >= CALLS_OF_A_SITE:
                raise ServiceError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED, f"{site} has too many calls open: try again later"
                )
            self._running[site] += 1
        try:
            yield
        finally:
            with self._lock:
                self._running[site] -= 1


def check_peer(home: StudyHome, context: Any) -> str:
    """The calling site; raises `ServiceError` unless its certificate is of an admitted site's key."""
    certificates = context.auth_context().get("x509_pem_cert", [])
    if not certificates:
        raise ServiceError(grpc.StatusCode.UNAUTHENTICATED, "show the certificate of an admitted site")
    try:
        certificate = x509.load_pem_x509_certificate(certificates[0])
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        name, key = str(names[0].value), certificate.public_key()
    except (ValueError, IndexError) as error:
        raise ServiceError(grpc.StatusCode.UNAUTHENTICATED, "the certificate names no site") from error
    now = datetime.datetime.now(datetime.UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise ServiceError(
            grpc.StatusCode.UNAUTHENTICATED, f"the certificate of '{name}' is not valid now: ask for a new one"
        )
    site = home.sites().get(name)
    if site is None:
        raise ServiceError(grpc.StatusCode.PERMISSION_DENIED, f"'{name}' is not a site of this study")
    if site.revoked is not None:
        raise ServiceError(grpc.StatusCode.PERMISSION_DENIED, f"site '{name}' was revoked: ask the study")
    if not isinstance(key, ec.EllipticCurvePublicKey) or public_line(key) != site.keys.certificate:
        raise ServiceError(
            grpc.StatusCode.PERMISSION_DENIED, f"the certificate is not of the key that '{name}' enrolled"
        )
    return name


def _releases(home: StudyHome) -> grpc.GenericRpcHandler:
    def offered(request: Empty, context: Any) -> Struct:
        return listing(list_releases(home))

    def manifest(request: StringValue, context: Any) -> BytesValue:
        return BytesValue(value=_find(home, request.value, MANIFEST).read_bytes())

    def fetch(request: Struct, context: Any) -> Iterator[BytesValue]:
        """A file in chunks, from the requested byte on."""
        try:
            wanted = read_file_request(request)
        except ValueError as error:
            raise ServiceError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error
        with _find(home, wanted.release, wanted.file).open("rb") as stream:
            size = stream.seek(0, 2)
            if wanted.offset > size:
                raise ServiceError(
                    grpc.StatusCode.OUT_OF_RANGE, f"{wanted.file} has {size} bytes, none from {wanted.offset} on"
                )
            stream.seek(wanted.offset)
            while chunk := stream.read(CHUNK_BYTES):
                yield BytesValue(value=chunk)

    def single(behaviour: Any, request: type[Message]) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(behaviour, parser(request), serialize)

    handlers = {
        LIST: single(offered, Empty),
        MANIFEST_OF: single(manifest, StringValue),
        FETCH: grpc.unary_stream_rpc_method_handler(fetch, parser(Struct), serialize),
    }
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def _find(home: StudyHome, release: str, file: str) -> Any:
    """A file of an issued release; both names are looked up in the listing, so none can point elsewhere."""
    listed = next((entry for entry in list_releases(home) if entry.name == release), None)
    if listed is None:
        raise ServiceError(grpc.StatusCode.NOT_FOUND, "there is no such release")
    if file not in listed.files:
        raise ServiceError(grpc.StatusCode.NOT_FOUND, "the release has no such file")
    return releases_folder(home) / listed.name / file


def _health() -> grpc.GenericRpcHandler:
    """The standard health service without Watch, whose streams never end; the standard makes it optional."""
    servicer = health.HealthServicer()
    for name in (health.OVERALL_HEALTH, SERVICE):
        servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    check = grpc.unary_unary_rpc_method_handler(servicer.Check, parser(health_pb2.HealthCheckRequest), serialize)
    return grpc.method_handlers_generic_handler(health.SERVICE_NAME, {"Check": check})


def _failure(error: Exception) -> ServiceError:
    """The error that a site receives for a failure of the server; the details stay in the server's log."""
    log.error("a call failed: %s", " ".join(str(error).split()) if isinstance(error, LdError) else repr(error))
    return ServiceError(grpc.StatusCode.INTERNAL, "the server failed: ask the study, whose log has the reason")
