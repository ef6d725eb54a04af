"""Whatever a kit file holds, reading it ends in a kit or in one clear error."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from ld_common.core.errors import DeploymentError
from ld_common.protocol.enrollment_kit import FILES, MANIFEST, SIGNATURE, KitManifest, check_manifest
from ld_common.protocol.keys import Purpose, new_signing_key, public_line, sign
from ld_common.protocol.kit_archive import read_kit, write_kit

KEY = new_signing_key()
CONTENTS = {name: name.encode() * 40 for name in FILES}
SAID = KitManifest("demo", "aster", "host:1", "host:2", "0" * 64, "1" * 64, "2" * 64, "", {}, "0.1", [], {})
JUNK: list[Any] = [
    None,
    7,
    -1e308,
    "",
    "a\nb",
    "\x1b[2J",
    "\ud800",
    "a" * 201,
    [],
    [1],
    {},
    {"a": 1},
]


@pytest.fixture
def kit(tmp_path: Path) -> bytes:
    write_kit(tmp_path / "whole.kit", SAID, CONTENTS, KEY)
    return (tmp_path / "whole.kit").read_bytes()


def refused(path: Path, content: bytes) -> bool:
    """Whether a kit of these bytes is refused as it should be; any other error is the test's."""
    path.write_bytes(content)
    try:
        read_kit(path)
    except DeploymentError as error:
        assert "\n" not in str(error)
        return True
    return False


def packed(manifest: bytes, signature: str = "", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A kit of that manifest."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in {MANIFEST: manifest, SIGNATURE: signature.encode(), **CONTENTS}.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def said(kit: bytes) -> dict[str, Any]:
    """What a kit's manifest says."""
    with zipfile.ZipFile(io.BytesIO(kit)) as archive:
        content: dict[str, Any] = json.loads(archive.read(MANIFEST))
        return content


def self_signed(content: Any) -> bytes:
    """A kit of what somebody signed with the key that it names; of what nobody can sign, with any signature."""
    try:
        signature = sign(KEY, Purpose.KIT, content)
    except (ValueError, RecursionError):
        signature = sign(KEY, Purpose.KIT, None)
    return packed(json.dumps(content).encode(), signature)


def mutated(content: bytes, dice: random.Random) -> bytes:
    """The bytes with a few of them changed, cut out, doubled or put in."""
    spoilt = bytearray(content)
    for _ in range(dice.randint(1, 6)):
        start = dice.randrange(len(spoilt))
        end = min(len(spoilt), start + dice.choice([1, 1, 2, 4, 30]))
        match dice.randrange(5):
            case 0:
                spoilt[start:end] = dice.randbytes(end - start)
            case 1:
                del spoilt[start:end]
            case 2:
                spoilt[start:start] = spoilt[start:end]
            case 3:
                spoilt[start] ^= 1 << dice.randrange(8)
            case _:
                spoilt[start:end] = dice.choice([b"\0", b"\xff"]) * (end - start)
    return bytes(spoilt)


@pytest.mark.attack
def test_a_kit_that_was_spoilt_anywhere_is_read_as_it_was_or_refused(kit: bytes, tmp_path: Path) -> None:
    dice, path = random.Random(20), tmp_path / "spoilt.kit"
    count = sum(refused(path, mutated(kit, dice)) for _ in range(600))
    assert count > 400  # the rest changed what nobody reads, such as an entry's date
    assert all(refused(path, kit[:length]) for length in range(0, len(kit) - 22, 37))


@pytest.mark.attack
def test_a_spoilt_manifest_is_refused(kit: bytes, tmp_path: Path) -> None:
    dice, manifest = random.Random(21), json.dumps(said(kit)).encode()
    signature = sign(KEY, Purpose.KIT, said(kit))
    assert not refused(tmp_path / "kit", packed(manifest, signature))
    for _ in range(300):
        spoilt = mutated(manifest, dice)
        assert refused(tmp_path / "kit", packed(spoilt, signature)) or json.loads(spoilt) == said(kit)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(KitManifest)])
@pytest.mark.attack
def test_a_signed_manifest_with_any_field_out_of_order_is_refused(kit: bytes, field: str, tmp_path: Path) -> None:
    whole = said(kit)
    for value in (junk for junk in JUNK if junk != whole[field]):
        assert refused(tmp_path / "kit", self_signed(whole | {field: value})), value
    assert refused(tmp_path / "kit", self_signed({name: whole[name] for name in whole if name != field}))


@pytest.mark.attack
def test_a_signed_manifest_of_another_shape_is_refused(kit: bytes, tmp_path: Path) -> None:
    whole, files = said(kit), said(kit)["files"]
    for content in [*JUNK, [whole], whole | {"more": 1}, whole | {"files": files | {"more": "0" * 64}}]:
        assert refused(tmp_path / "kit", self_signed(content))
    for name in FILES:
        for value in (*JUNK, "0" * 64):
            assert refused(tmp_path / "kit", self_signed(whole | {"files": files | {name: value}}))
        assert refused(
            tmp_path / "kit", self_signed(whole | {"files": {one: files[one] for one in files if one != name}})
        )
    weak = public_line(ec.generate_private_key(ec.SECP256R1()).public_key())
    for name in ("study_digest", "base_digest", "modality_digest"):
        for digest in ("0" * 63, "A" * 64, "0" * 64 + "\n"):
            assert refused(tmp_path / "kit", self_signed(whole | {name: digest}))
    for line in (weak, "ssh-ed25519 AAAA", whole["public_key"] + " <script>", "\n" + whole["public_key"]):
        assert refused(tmp_path / "kit", self_signed(whole | {"public_key": line}))


@pytest.mark.parametrize("depth", [500, 900, 1_000, 100_000])
@pytest.mark.attack
def test_a_manifest_that_is_nested_deep_is_refused(kit: bytes, depth: int) -> None:
    signature, nested = sign(KEY, Purpose.KIT, said(kit)), b"[" * depth + b"]" * depth
    whole = json.dumps(said(kit)).encode()
    for manifest in (nested, b'{"a":' * depth, whole.replace(b'"demo"', nested), b'{"format": %b}' % nested):
        with pytest.raises(DeploymentError):
            check_manifest(manifest, signature, CONTENTS)


@pytest.mark.attack
def test_archives_that_no_kit_is_are_refused(kit: bytes, tmp_path: Path) -> None:
    manifest, signature = json.dumps(said(kit)).encode(), sign(KEY, Purpose.KIT, said(kit))
    assert not refused(tmp_path / "kit", packed(manifest, signature, zipfile.ZIP_STORED))
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        assert refused(tmp_path / "kit", packed(manifest, signature, method))
    encrypted = bytearray(kit)
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = -1
        while (start := kit.find(mark, start + 1)) >= 0:
            encrypted[start + offset] |= 1
    assert refused(tmp_path / "kit", bytes(encrypted))
    with pytest.raises(DeploymentError, match="not a site kit"):
        read_kit(tmp_path)
    assert refused(tmp_path / "kit", packed(b" " * 33_000_000))


@pytest.mark.parametrize("changes", [{"study": "a\nb"}, {"server": ""}, {"base_digest": "0"}, {"software": "v" * 201}])
def test_no_kit_is_written_that_nobody_reads(changes: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=next(iter(changes))):
        write_kit(tmp_path / "one.kit", dataclasses.replace(SAID, **changes), CONTENTS, KEY)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
