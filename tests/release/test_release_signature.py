"""Whether a release is believed: signatures, trusted keys, encryption to named sites."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.command import run_cli
from ld_common.core.config import from_mapping
from ld_common.core.errors import ConfigError, ReleaseError, SignatureError
from ld_common.diffusion.base_model import base_digest, load_denoiser
from ld_common.diffusion.drift import LatentDrift
from ld_common.imaging.modality import Modality
from ld_common.protocol.keys import (
    Purpose,
    fingerprint,
    new_elliptic_key,
    new_signing_key,
    public_line,
    sign,
    write_private_key,
)
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.encryption import SEGMENT, TAG, open_release, seal_release
from ld_common.release.release import (
    ADAPTER,
    CARD,
    ENVELOPE,
    MANIFEST,
    SEALED,
    SIGNATURE,
    ReleaseContent,
    read_manifest,
    read_release,
    write_release,
)
from ld_common.release.signature import check_release, release_name, sign_release
from ld_common.release.trusted_keys import read_trust, read_trusted_release, trusted_keys_file
from ld_generate.cli import cli
from tests.support.deployed_study import small_release

KEY, OTHER = new_signing_key(), new_signing_key()


@pytest.fixture(autouse=True)
def config_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without trusted keys."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config"


@pytest.fixture
def released(tmp_path: Path, brain_mri: Modality) -> Path:
    return small_release(tmp_path / "release", brain_mri)


@pytest.fixture
def signed(released: Path) -> Path:
    sign_release(released, KEY)
    return released


def edit(folder: Path, **changes: object) -> None:
    content = json.loads((folder / MANIFEST).read_text()) | changes
    (folder / MANIFEST).write_text(json.dumps(content))


# Signatures


def test_a_signed_release_is_believed_and_still_read_without_a_key(signed: Path) -> None:
    assert check_release(signed, [OTHER.public_key(), KEY.public_key()]) == read_release(signed).manifest


@pytest.mark.attack
def test_a_manifest_may_be_written_otherwise_but_not_say_otherwise(signed: Path) -> None:
    edit(signed)  # the same content in one line
    check_release(signed, [KEY.public_key()])
    edit(signed, rounds=[])
    with pytest.raises(SignatureError, match="altered"):
        check_release(signed, [KEY.public_key()])


@pytest.mark.parametrize("name", [ADAPTER, CARD])
@pytest.mark.attack
def test_a_file_that_was_altered_after_signing_is_refused(signed: Path, name: str) -> None:
    with (signed / name).open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(ReleaseError, match="not the file that was released"):
        check_release(signed, [KEY.public_key()])


@pytest.mark.attack
def test_another_key_is_refused_even_where_it_names_itself_as_the_trusted_one(signed: Path) -> None:
    with pytest.raises(SignatureError, match="another key"):
        check_release(signed, [OTHER.public_key()])
    content = json.loads((signed / SIGNATURE).read_text())
    content["public_key"] = public_line(OTHER.public_key())
    (signed / SIGNATURE).write_text(json.dumps(content))
    with pytest.raises(SignatureError, match="another key"):
        check_release(signed, [OTHER.public_key()])


@pytest.mark.attack
def test_a_signature_for_another_purpose_does_not_sign_a_release(signed: Path) -> None:
    content = json.loads((signed / SIGNATURE).read_text())
    content["signature"] = sign(KEY, Purpose.KIT, read_manifest(signed))
    (signed / SIGNATURE).write_text(json.dumps(content))
    with pytest.raises(SignatureError):
        check_release(signed, [KEY.public_key()])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b'{"format": 2}', b"\xff", b"[" * 9_000])
@pytest.mark.attack
def test_what_is_no_signature_is_one_clear_error(signed: Path, content: bytes) -> None:
    (signed / SIGNATURE).write_bytes(content)
    with pytest.raises(SignatureError) as caught:
        check_release(signed, [KEY.public_key()])
    assert "\n" not in str(caught.value)


def test_an_altered_release_is_not_signed(released: Path) -> None:
    (released / CARD).write_text("better than it is")
    with pytest.raises(ReleaseError):
        sign_release(released, KEY)
    assert not (released / SIGNATURE).exists()


@pytest.mark.attack
def test_a_name_of_an_issued_release_leads_nowhere_else() -> None:
    manifest = {"study": {"name": "../../etc/ cron"}, "release": {"number": 3}}
    assert release_name(manifest) == "etc-cron-3" or "/" not in release_name(manifest)
    assert not release_name(manifest).startswith(".")
    with pytest.raises(ReleaseError, match="not issued"):
        release_name({"study": {"name": "demo"}})


# Trust


@pytest.mark.attack
def test_a_release_is_refused_until_its_key_is_trusted_and_then_it_is_for_good(signed: Path) -> None:
    with pytest.raises(SignatureError, match="not trusted yet") as caught:
        read_trusted_release(signed)
    assert fingerprint(KEY.public_key()) in str(caught.value)
    release, said = read_trusted_release(signed, trust=public_line(KEY.public_key()))
    assert release.signed_by == fingerprint(KEY.public_key())
    assert str(trusted_keys_file()) in said[0]
    again, said = read_trusted_release(signed)
    assert (again.signed_by, said) == (release.signed_by, [])


@pytest.mark.attack
def test_a_key_that_did_not_sign_is_not_remembered(signed: Path) -> None:
    with pytest.raises(SignatureError, match="not by the key that --trust names"):
        read_trusted_release(signed, trust=public_line(OTHER.public_key()))
    edit(signed, rounds=[])
    with pytest.raises(SignatureError, match="altered"):
        read_trusted_release(signed, trust=public_line(KEY.public_key()))
    assert not trusted_keys_file().exists()


@pytest.mark.attack
def test_a_key_is_trusted_for_its_study_alone(signed: Path, tmp_path: Path, brain_mri: Modality) -> None:
    read_trusted_release(signed, trust=public_line(KEY.public_key()))
    other = small_release(tmp_path / "other", brain_mri, name="another study")
    sign_release(other, KEY)
    with pytest.raises(SignatureError, match="another study"):
        read_trusted_release(other)
    read_trusted_release(other, trust=public_line(KEY.public_key()))
    assert read_trusted_release(signed)[0].signed_by == read_trusted_release(other)[0].signed_by is not None


@pytest.mark.attack
def test_a_kit_vouches_for_releases_of_its_own_study_alone(signed: Path, tmp_path: Path) -> None:
    kit = tmp_path / "kit.json"
    kit.write_text(json.dumps({"public_key": public_line(KEY.public_key()), "study": "foo"}))
    with pytest.raises(SignatureError, match=r"'demo'.*'foo'"):
        read_trusted_release(signed, trust=str(kit))
    assert not trusted_keys_file().exists()
    kit.write_text(json.dumps({"public_key": public_line(KEY.public_key()), "study": "demo"}))
    assert read_trusted_release(signed, trust=str(kit))[0].signed_by == fingerprint(KEY.public_key())


def test_a_second_key_of_a_study_is_remarked_upon(signed: Path) -> None:
    _, said = read_trusted_release(signed, trust=public_line(KEY.public_key()))
    assert len(said) == 1
    sign_release(signed, OTHER)
    _, (_, note) = read_trusted_release(signed, trust=public_line(OTHER.public_key()))
    assert note.startswith("note: 'demo' has another trusted key already")
    assert fingerprint(KEY.public_key()) in note
    assert read_trusted_release(signed, trust=public_line(OTHER.public_key()))[1] == []


@pytest.mark.parametrize("name", ["", " ", "de\nmo", "\x1b[31mdemo", "d" * 201])
@pytest.mark.attack
def test_a_study_whose_name_is_no_plain_line_is_not_trusted(signed: Path, name: str) -> None:
    edit(signed, study={"name": name})
    sign_release(signed, KEY)
    with pytest.raises(ReleaseError, match="no study's name"):
        read_trusted_release(signed, trust=public_line(KEY.public_key()))
    assert not trusted_keys_file().exists()


@pytest.mark.attack
def test_unsigned_is_refused_unless_allowed_and_says_so(released: Path) -> None:
    with pytest.raises(SignatureError, match="--allow-unsigned"):
        read_trusted_release(released)
    release, said = read_trusted_release(released, allow_unsigned=True)
    assert release.signed_by is None
    assert "not signed" in said[0]
    with pytest.raises(ConfigError, match="exclude each other"):
        read_trusted_release(released, trust=public_line(KEY.public_key()), allow_unsigned=True)


@pytest.mark.attack
def test_a_signature_that_was_removed_is_missed(signed: Path) -> None:
    read_trusted_release(signed, trust=public_line(KEY.public_key()))
    (signed / SIGNATURE).unlink()
    with pytest.raises(SignatureError, match="somebody removed its signature"):
        read_trusted_release(signed, allow_unsigned=True)


@pytest.mark.parametrize("name", ["adapter.py", "unet/adapter_model.safetensors", ".hidden"])
@pytest.mark.attack
def test_a_file_that_no_signature_covers_is_refused(signed: Path, name: str) -> None:
    (signed / name).parent.mkdir(exist_ok=True)
    (signed / name).write_text("planted")
    with pytest.raises(ReleaseError, match="does not list"):
        read_trusted_release(signed, trust=public_line(KEY.public_key()))


@pytest.mark.attack
def test_a_manifest_with_a_key_twice_is_refused(signed: Path) -> None:
    text = (signed / MANIFEST).read_text()
    (signed / MANIFEST).write_text(text.replace("{", '{"weights": "planted.safetensors", ', 1))
    with pytest.raises(ReleaseError, match="not JSON"):
        read_trusted_release(signed, trust=public_line(KEY.public_key()))


@pytest.mark.attack
def test_an_older_release_than_was_used_is_remarked_upon(tmp_path: Path, brain_mri: Modality) -> None:
    folders = {}
    for number in (2, 3):
        folders[number] = small_release(tmp_path / str(number), brain_mri)
        edit(folders[number], release={"number": number})
        sign_release(folders[number], KEY)
    trust = public_line(KEY.public_key())
    assert not any("release" in line and "before" in line for line in read_trusted_release(folders[2], trust)[1])
    assert read_trusted_release(folders[3])[1] == []
    assert read_trusted_release(folders[3])[1] == []
    (said,) = read_trusted_release(folders[2])[1]
    assert "release 2" in said
    assert "release 3" in said


@pytest.mark.attack
def test_allowing_unsigned_does_not_allow_a_signature_that_fails(signed: Path) -> None:
    with pytest.raises(SignatureError, match="not trusted yet"):
        read_trusted_release(signed, allow_unsigned=True)


def test_a_key_is_given_as_line_file_or_kit(tmp_path: Path) -> None:
    line = public_line(KEY.public_key())
    (tmp_path / "study.pub").write_text(line + " the study\n")
    (tmp_path / "kit.json").write_text(json.dumps({"public_key": line, "study": "demo"}))
    for given in (line, line + " comment", str(tmp_path / "study.pub"), str(tmp_path / "kit.json")):
        trust = read_trust(given)
        assert (public_line(trust.key), trust.study) == (line, "demo" if given.endswith(".json") else None)
    write_private_key(tmp_path / "study.key", KEY)
    broken = [tmp_path / f"{number}.json" for number in range(4)]
    for file, study in zip(broken, ({}, {"study": ["demo"]}, {"study": "a\nb"}, {"study": ""}), strict=True):
        file.write_text(json.dumps({"public_key": line} | study))
    for wrong in ("", "ssh-ed25519", "nowhere", "x" * 9_000, str(tmp_path / "study.key"), *map(str, broken)):
        with pytest.raises(SignatureError) as caught:
            read_trust(wrong)
        assert "PRIVATE" not in str(caught.value)


def test_the_file_of_trusted_keys_may_hold_comments_and_is_refused_when_it_is_broken(signed: Path) -> None:
    file = trusted_keys_file()
    file.parent.mkdir(parents=True)
    file.write_text(f"# studies\n\n{public_line(KEY.public_key())} demo")
    read_trusted_release(signed)
    read_trusted_release(signed, trust=public_line(KEY.public_key()))
    assert file.read_text().count("ssh-ed25519") == 1  # known already
    file.write_text(public_line(KEY.public_key()) + "\n")
    with pytest.raises(SignatureError, match="line 1"):
        read_trusted_release(signed)


def test_a_home_that_cannot_be_written_does_not_stop_a_trusted_key(signed: Path, config_home: Path) -> None:
    config_home.write_text("a file where a folder should be")
    with pytest.raises(SignatureError, match="cannot read the trusted keys"):
        read_trusted_release(signed)
    config_home.unlink()
    config_home.mkdir()
    (config_home / "latent-drift").symlink_to("nowhere")
    release, said = read_trusted_release(signed, trust=public_line(KEY.public_key()))
    assert release.signed_by is not None
    assert "cannot be remembered" in said[0]


# ld-generate


@pytest.fixture(scope="module")
def drawable(smallest_base: Path, brain_mri: Modality, tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = from_mapping(
        StudyConfig, {"name": "drawn", "base_model": str(smallest_base), "adapter": {"name": "lora", "rank": 2}}
    )
    state = inject(load_denoiser(str(smallest_base)), read_adapter(study.adapter), study.seed).state()
    folder, drift = tmp_path_factory.mktemp("drawable"), LatentDrift(torch.zeros(4, 1, 1))
    return write_release(folder, study, brain_mri, ReleaseContent(base_digest(str(smallest_base)), state, drift))


def generate(
    capsys: pytest.CaptureFixture[str], release: Path, out: Path, base: Path, *arguments: str
) -> tuple[int, str]:
    options = ["--source", "age=74,sex=F,diagnosis=CN", "--samples", "1", "--num-inference-steps", "2"]
    with pytest.raises(SystemExit) as ended:
        run_cli(cli, ["sample", str(release), *options, "--base", str(base), "--out", str(out), *arguments])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out + said.err


@pytest.mark.slow
@pytest.mark.attack
def test_ld_generate_draws_only_from_what_is_trusted(
    drawable: Path, smallest_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(drawable, release)
    code, said = generate(capsys, release, out, smallest_base)
    assert (code, "is not signed" in said, out.exists()) == (2, True, False)
    sign_release(release, KEY)
    code, said = generate(capsys, release, out, smallest_base, "--allow-unsigned")
    assert (code, "not trusted yet" in said, out.exists()) == (2, True, False)
    code, said = generate(capsys, release, out, smallest_base, "--trust", public_line(KEY.public_key()))
    assert code == 0, said
    record = json.loads((out / "record.json").read_text())
    assert record["release"]["signed_by"] == fingerprint(KEY.public_key())
    assert "from now on" in said
    code, said = generate(capsys, release, tmp_path / "later", smallest_base)
    assert (code, "from now on" in said) == (0, False), said
    edit(release, rounds=[1])
    code, said = generate(capsys, release, tmp_path / "altered", smallest_base)
    assert (code, "altered" in said, said.strip().count("\n")) == (2, True, 0)


# Encryption


@pytest.fixture
def large(tmp_path: Path, brain_mri: Modality) -> Path:
    """A release of more than one segment."""
    folder = small_release(tmp_path / "large", brain_mri)
    (folder / ADAPTER).write_bytes(torch.randint(0, 255, (SEGMENT + 1000,), dtype=torch.uint8).numpy().tobytes())
    return folder


@pytest.mark.parametrize("size", [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT])
def test_each_recipient_gets_the_same_adapter_back(tmp_path: Path, size: int) -> None:
    content = bytes(index * 7 % 251 for index in range(1000)) * (size // 1000 + 1)
    folder, keys = tmp_path / "folder", {"aster": new_elliptic_key(), "birch": new_elliptic_key()}
    folder.mkdir()
    (folder / ADAPTER).write_bytes(content[:size])
    manifest = {"files": {ADAPTER: "", CARD: ""}, "weights": ADAPTER}
    seal_release(folder, manifest, {name: key.public_key() for name, key in keys.items()})
    assert not (folder / ADAPTER).exists()
    for name, key in keys.items():
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        open_release(copy, manifest, name, key)
        assert [path.name for path in copy.iterdir()] == [ADAPTER]
        assert (copy / ADAPTER).read_bytes() == content[:size]


@pytest.mark.attack
def test_what_is_sealed_shows_nothing_of_the_adapter(large: Path) -> None:
    plain = (large / ADAPTER).read_bytes()
    seal_release(large, read_manifest(large), {"aster": new_elliptic_key().public_key()})
    hidden = (large / SEALED).read_bytes()
    assert len(hidden) == len(plain) + 2 * TAG
    assert all(plain[start : start + 16] not in hidden for start in range(0, len(plain) - 16, 4096))
    with pytest.raises(ReleaseError, match="ld-client pull"):
        read_release(large)


@pytest.mark.attack
def test_nobody_else_opens_it(large: Path) -> None:
    manifest, key = read_manifest(large), new_elliptic_key()
    seal_release(large, manifest, {"aster": key.public_key()})
    with pytest.raises(ReleaseError, match="encrypted to aster, not to 'birch'"):
        open_release(large, manifest, "birch", key)
    with pytest.raises(ReleaseError, match="does not open"):
        open_release(large, manifest, "aster", new_elliptic_key())
    envelope = json.loads((large / ENVELOPE).read_text())
    envelope["recipients"]["birch"] = envelope["recipients"]["aster"]
    (large / ENVELOPE).write_text(json.dumps(envelope))
    with pytest.raises(ReleaseError, match="does not open"):  # sealed to a key as aster's, not as birch's
        open_release(large, manifest, "birch", key)
    with pytest.raises(ReleaseError, match="not on NIST P-384"):
        seal_release(large, manifest, {"aster": KEY.public_key()})
    assert not (large / ADAPTER).exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: bytes([raw[0] ^ 1]) + raw[1:],
        lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
        lambda raw: raw[: SEGMENT + TAG],  # the last segment is missing, the first one is whole
        lambda raw: raw[SEGMENT + TAG :] + raw[: SEGMENT + TAG],
        lambda raw: raw + raw[SEGMENT + TAG :],
        lambda raw: b"",
    ],
)
@pytest.mark.attack
def test_a_sealed_adapter_that_was_altered_does_not_open(large: Path, spoil: object) -> None:
    manifest, key = read_manifest(large), new_elliptic_key()
    seal_release(large, manifest, {"aster": key.public_key()})
    (large / SEALED).write_bytes(spoil((large / SEALED).read_bytes()))  # type: ignore[operator]
    with pytest.raises(ReleaseError, match="altered"):
        open_release(large, manifest, "aster", key)
    assert not (large / ADAPTER).exists()
    assert not list(large.glob("*.part"))


@pytest.mark.attack
def test_a_sealed_adapter_opens_under_its_own_manifest_only(large: Path) -> None:
    manifest, key = read_manifest(large), new_elliptic_key()
    seal_release(large, manifest, {"aster": key.public_key()})
    with pytest.raises(ReleaseError):
        open_release(large, manifest | {"rounds": []}, "aster", key)
    open_release(large, manifest, "aster", key)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 9}', b'{"format": 2, "recipients": {"../x": ""}}'])
@pytest.mark.attack
def test_what_is_no_envelope_is_one_clear_error(large: Path, content: bytes) -> None:
    manifest, key = read_manifest(large), new_elliptic_key()
    seal_release(large, manifest, {"aster": key.public_key()})
    (large / ENVELOPE).write_bytes(content)
    with pytest.raises(ReleaseError):
        open_release(large, manifest, "aster", key)
