"""Signatures hold for what was signed, by whom, for what purpose, and for nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from ld_common.core.errors import SignatureError
from ld_common.protocol.keys import (
    PrivateKey,
    Purpose,
    canonical,
    fingerprint,
    is_digest,
    is_line,
    new_elliptic_key,
    new_signing_key,
    public_line,
    read_private_key,
    read_public_line,
    sign,
    verify,
    write_private_key,
)

CONTENT = {"b": [1, 2.5, "ü"], "a": None}
KEYS = [new_signing_key(), new_elliptic_key()]


@pytest.mark.parametrize("key", KEYS)
def test_signature_holds_whatever_the_order_of_keys(key: PrivateKey) -> None:
    signature = sign(key, Purpose.KIT, CONTENT)
    verify(key.public_key(), Purpose.KIT, dict(reversed(CONTENT.items())), signature)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.attack
def test_signature_of_other_content_purpose_or_key_is_refused(key: PrivateKey) -> None:
    signature, public = sign(key, Purpose.KIT, CONTENT), key.public_key()
    other = new_signing_key() if key is KEYS[0] else new_elliptic_key()
    with pytest.raises(SignatureError, match="does not hold"):
        verify(public, Purpose.RELEASE, CONTENT, signature)
    with pytest.raises(SignatureError, match="does not hold"):
        verify(public, Purpose.KIT, CONTENT | {"a": 0}, signature)
    with pytest.raises(SignatureError, match="does not hold"):
        verify(other.public_key(), Purpose.KIT, CONTENT, signature)
    for broken in ("", "no base64!", signature[:-4], "ä"):
        with pytest.raises(SignatureError, match="does not hold"):
            verify(public, Purpose.KIT, CONTENT, broken)


@pytest.mark.attack
def test_what_is_nested_too_deep_to_be_signed_does_not_hold() -> None:
    content: list[object] = []
    for _ in range(100_000):
        content = [content]
    with pytest.raises(SignatureError, match="does not hold"):
        verify(KEYS[0].public_key(), Purpose.KIT, content, sign(KEYS[0], Purpose.KIT, []))


def test_digests_and_lines_are_told_from_anything_else() -> None:
    assert is_digest("0123456789abcdef" * 4)
    assert not any(map(is_digest, ["a" * 63, "A" * 64, "a" * 64 + "\n", "g" * 64, "", None, 7, b"a" * 64]))
    assert all(map(is_line, ["a", "Uniklinik Köln, 3", "a" * 200]))
    assert not any(map(is_line, ["", "a\nb", "a\tb", "\x1b[31m", "\u202e", "a" * 201, None, 7, b"a"]))


def test_canonical_json_refuses_what_json_has_no_word_for() -> None:
    assert canonical(CONTENT) == '{"a":null,"b":[1,2.5,"ü"]}'.encode()
    with pytest.raises(ValueError, match="JSON"):
        canonical(float("nan"))


@pytest.mark.parametrize("openssh", [False, True])
@pytest.mark.parametrize("key", KEYS)
def test_keys_survive_their_files_and_lines(key: PrivateKey, openssh: bool, tmp_path: Path) -> None:
    file = tmp_path / "keys" / "one.key"
    write_private_key(file, key, openssh)
    assert file.stat().st_mode & 0o777 == 0o600
    signature = sign(read_private_key(file), Purpose.KIT, CONTENT)
    line = public_line(key.public_key())
    verify(read_public_line(f"  {line} somebody@somewhere\n"), Purpose.KIT, CONTENT, signature)
    assert fingerprint(read_public_line(line)) == fingerprint(key.public_key())
    with pytest.raises(SignatureError, match="File exists"):
        write_private_key(file, key)


@pytest.mark.attack
def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "one.key"
    write_private_key(file, KEYS[0])
    file.chmod(0o640)
    with pytest.raises(SignatureError, match="chmod 600"):
        read_private_key(file)
    with pytest.raises(SignatureError, match="cannot read"):
        read_private_key(tmp_path / "absent.key")
    file.chmod(0o600)
    file.write_text("-----BEGIN NOTHING-----")
    with pytest.raises(SignatureError, match="not a key"):
        read_private_key(file)


@pytest.mark.attack
def test_only_keys_of_this_software_are_read() -> None:
    weak = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(SignatureError, match="P-384"):
        read_public_line(public_line(weak))
    for line in ("", "ssh-ed25519", "ssh-ed25519 AAAA", "ssh-rsa AAAAB3NzaC1yc2E="):
        with pytest.raises(SignatureError, match="public key"):
            read_public_line(line)


def test_fingerprint_is_what_ssh_keygen_shows() -> None:
    line = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"
    assert fingerprint(read_public_line(line)) == "SHA256:+DiY3wvvV6TuJJhbpZisF/zLDA0zPMSvHdkr4UvCOqU"
