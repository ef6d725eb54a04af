"""Messages between the release service and a site that pulls: protobuf's well-known types over gRPC.

List      Empty                            -> Struct {releases: [{name, number, files: {name: bytes}}]}
Manifest  StringValue name                 -> BytesValue manifest.json
Fetch     Struct {release, file, offset}   -> stream of BytesValue, the file from that byte on
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message
from google.protobuf.struct_pb2 import Struct

SERVICE = "latent_drift.v1.Releases"
LIST, MANIFEST_OF, FETCH = "List", "Manifest", "Fetch"
MAX_REQUEST_BYTES = 16_000
MAX_MESSAGE_BYTES = 16_000_000
"""Largest message; a manifest must fit."""
CHUNK_BYTES = 256 * 1024

M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class Listed:
    """A release that the service offers."""

    name: str
    number: int
    files: dict[str, int]
    """Name -> size in bytes."""


@dataclass(frozen=True)
class FileRequest:
    """A request for a file of a release, from an offset in bytes."""

    release: str
    file: str
    offset: int


def method(name: str) -> str:
    """A method's full gRPC path."""
    return f"/{SERVICE}/{name}"


def serialize(message: Message) -> bytes:
    """A message's bytes."""
    return message.SerializeToString()


def parser(kind: type[M]) -> Callable[[bytes], M | None]:
    """A deserializer that returns None for bytes of another type, so that gRPC ends the call without a traceback."""

    def parse(raw: bytes) -> M | None:
        message = kind()
        try:
            message.ParseFromString(raw)
        except (DecodeError, RecursionError):
            return None
        return message

    return parse


def listing(releases: list[Listed]) -> Struct:
    """The answer to `List`."""
    message = Struct()
    message.update({"releases": [vars(release) for release in releases]})
    return message


def read_listing(message: Struct) -> list[Listed]:
    """The releases of an answer to `List`; raises `ValueError`."""
    try:
        entries = _plain(message)["releases"]
        return [
            Listed(
                name=_folder_name(entry["name"]),
                number=_count(entry["number"]),
                files={str(name): _count(size) for name, size in entry["files"].items()},
            )
            for entry in entries
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("not a list of releases") from error


def file_request(request: FileRequest) -> Struct:
    """The request of `Fetch`."""
    message = Struct()
    message.update(vars(request))
    return message


def read_file_request(message: Struct) -> FileRequest:
    """The file that `Fetch` asks for; raises `ValueError`."""
    fields = _plain(message)
    if set(fields) != {"release", "file", "offset"}:
        raise ValueError("give release, file and offset")
    if not isinstance(fields["release"], str) or not isinstance(fields["file"], str):
        raise ValueError("release and file are names")
    return FileRequest(fields["release"], fields["file"], _count(fields["offset"]))


def _folder_name(value: Any) -> str:
    """A folder name without path separators; raises `ValueError`."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,150}", value):
        raise ValueError("the release's name is not a folder name")
    return value


def _count(value: Any) -> int:
    """A Struct's number, always a float, as a whole number; raises `ValueError`."""
    whole = isinstance(value, float) and math.isfinite(value) and value == int(value) and 0 <= value < 2**53
    if not whole:
        raise ValueError("a number is not whole, or negative")
    return int(value)


def _plain(value: Any) -> Any:
    """A protobuf `Struct` as plain Python, numbers as floats."""
    if isinstance(value, Struct):
        return {key: _plain_value(field) for key, field in value.fields.items()}
    return _plain_value(value)


def _plain_value(value: Any) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return _plain(value.struct_value)
    if kind == "list_value":
        return [_plain_value(item) for item in value.list_value.values]
    return None if kind in (None, "null_value") else getattr(value, kind)
