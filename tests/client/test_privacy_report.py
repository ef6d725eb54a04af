"""What a data protection officer signs: true to release, ledger and audit, without a patient, no ε where none is."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ld_client.audit.copies import CopyPair, CopyReport
from ld_client.audit.membership import LOSS_THRESHOLD, MembershipReport
from ld_client.audit.one_run import EpsilonBound, audit_epsilon
from ld_client.audit.run import Audit, AuditOptions
from ld_client.audit.statistics import AuditError, area_under_curve, operating_point, share
from ld_client.cli import app
from ld_client.data.store import open_store
from ld_client.privacy.ledger import DRIFT, TRAINING, Ledger, Use
from ld_client.privacy_report.report import write_privacy_report
from ld_client.site_config import PolicyConfig, SiteConfig, load_modality, load_site
from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.config import from_mapping
from ld_common.core.errors import ReleaseError, SignatureError
from ld_common.diffusion.base_model import base_digest, load_denoiser
from ld_common.protocol.dp_accounting import Charge, epsilon
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import ReleaseContent, read_release, write_release
from tests.conftest import PLANTED_ROWS, write_table
from tests.support.site_homes import index_site

PRIVACY = {
    "enabled": True,
    "target_epsilon": 2.0,
    "patients": 10,
    "expected_batch_size": 10,
    "augmentation_multiplicity": 1,
}
RANDOM_MEMBERS, RANDOM_OTHERS = [float(row % 7) for row in range(120)], [float(row % 7) for row in range(119)]


@dataclass
class Hospital:
    """A site whose store excludes one row, and what it takes to make reports of it."""

    site: SiteConfig
    folder: Path
    facts: Any = None
    """Of the last report."""

    def study(self, **options: Any) -> StudyConfig:
        federation = {"rounds": 2, "sites": ["aster", "birch", "cedar"], "weighting": "equal"}
        common: dict[str, Any] = {
            "base_model": self.site.base_model,
            "adapter": {"rank": 1, "targets": ["to_k"]},
            "training": {"steps": 2},
            "federation": federation,
        }
        return from_mapping(StudyConfig, common, options)

    def release(self, study: StudyConfig) -> Path:
        """A release of a study of two rounds; the second left this site out."""
        said = {"uplink_bytes": 4096, "patients": None, "visits": None}
        sites = {name: said for name in study.federation.sites}
        others = {name: said for name in study.federation.sites if name != "aster"}
        rounds = [
            {"round": 1, "sites": sites, "left_out": {}, "counted": True},
            {"round": 2, "sites": others, "left_out": {"aster": "it was not connected"}, "counted": True},
        ]
        state = inject(load_denoiser(self.site.base_model), read_adapter(study.adapter), study.seed).state()
        digest = base_digest(self.site.base_model)
        return write_release(
            self.folder / study.name, study, load_modality(self.site), ReleaseContent(digest, state, rounds=rounds)
        )

    def charge(self, study: StudyConfig, round_number: int = 1) -> None:
        """Pay for a round as a site does."""
        charges: dict[str, Charge | None] = {TRAINING: None}
        if study.privacy.enabled:
            planned = study.privacy_plan()
            charges = {TRAINING: replace(planned.step, steps=2), DRIFT: planned.drift}
        Ledger(self.site.ledger_path).charge(Use(study.name, study.digest(), round_number, charges), 1e9, 1e-5)

    def audit(self, release: Path, **changes: Any) -> Path:
        """An audit.json that found nothing, and whose pairs point to scans."""
        found = read_release(release)
        audit = Audit(
            time="2026-07-01T09:30:00+00:00",
            site="aster",
            study=found.study.name,
            study_digest=found.study.digest(),
            adapter_sha256=found.adapter_sha256,
            differential_privacy=found.study.privacy.enabled,
            options=AuditOptions(),
            membership=(membership(RANDOM_MEMBERS, RANDOM_OTHERS),),
            copies=CopyReport("distance", 120, share(104, 200), 0.4, 0.6, 0.3, 0.05, 1.0, share(11, 200), "", (PAIR,)),
            canaries=audit_epsilon([float(row) for row in range(100)], [row % 2 == 0 for row in range(100)], 1e-5),
        )
        path = self.folder / "audit.json"
        path.write_text(json.dumps(replace(audit, **changes).to_mapping()))
        return path

    def report(self, release: Path, audit: Path | None = None, site: SiteConfig | None = None) -> str:
        """The page's text."""
        out = self.folder / "report.html"
        self.facts = write_privacy_report(site or self.site, read_release(release), release, audit, out)
        return out.read_text(encoding="utf-8")


PAIR = CopyPair(generated=31337, training=41337, training_distance=0.1, held_out=51337, held_out_distance=0.2)


def membership(members: list[float], others: list[float]) -> MembershipReport:
    points = tuple(operating_point(members, others, rate) for rate in (0.01, 0.001))
    return MembershipReport(LOSS_THRESHOLD, len(members), len(others), 0.95, area_under_curve(members, others), points)


@pytest.fixture
def hospital(site_yaml: Path, tmp_path: Path) -> Hospital:
    write_table(site_yaml, [*PLANTED_ROWS, "PLANTED-DORA,2020-01-01,50,Female,Normal"])
    site = load_site(site_yaml, ["held_out=0.4"])
    index_site(site)
    return Hospital(site, tmp_path / "releases")


def words(page: str) -> str:
    """What is read: without style, tags and line breaks."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page.split("</style>")[1])).split())


def test_a_private_study_is_reported_with_its_promise_its_costs_and_its_attacks(hospital: Hospital) -> None:
    study = hospital.study(name="private", privacy=PRIVACY)
    release = hospital.release(study)
    hospital.charge(study)
    page = hospital.report(release, hospital.audit(release))
    said, stated = words(page), read_release(release).manifest["privacy"]
    total = epsilon([entry.charge for entry in Ledger(hospital.site.ledger_path).entries() if entry.charge], 1e-5)
    for expected in (
        f"ε {stated['epsilon']:.4g} at δ 0.00001",
        stated["unit"],
        "PRV (Opacus)",
        "every patient takes part in a step with probability 1,",
        f"Spent, all together ε {total:.4g}",
        f"Left ε {10 - total:.4g}",
        "2 steps, σ ",
        "noised, charged",
        "as this study was run: with differential privacy, without secure aggregation".capitalize(),
        "left out: it was not connected",
        "no scan 1 0",
        "ε 3.",
        read_release(release).adapter_sha256,
        study.digest(),
        "Signature",
    ):
        assert expected in said
    assert hospital.facts.warnings == []
    for field in dataclasses.fields(PolicyConfig):
        assert re.search(rf"\b{field.name}\b", said)


def test_a_study_without_privacy_is_reported_without_any_epsilon(hospital: Hospital) -> None:
    study, private = hospital.study(name="open"), hospital.study(name="private", privacy=PRIVACY)
    release = hospital.release(study)
    hospital.charge(private)
    hospital.charge(study)
    for audit in (None, hospital.audit(release)):
        page = hospital.report(release, audit)
        assert "without differential privacy" in words(page)
        said = words(page).replace("no ε can be stated", "").replace("no ε exists", "")
        assert not re.search("[εδ]|epsilon", said)
    assert "100 guesses" in said


def test_without_an_audit_the_report_says_so_and_how_to_make_one(hospital: Hospital) -> None:
    release = hospital.release(hospital.study(name="open"))
    said = words(hospital.report(release))
    assert "No attack was made on this release" in said
    assert "ld-client audit-privacy --home" in said
    assert "held_out is 0" in words(hospital.report(release, site=replace(hospital.site, held_out=0.0)))


def test_the_report_names_no_patient_and_no_file_and_needs_nothing_else(hospital: Hospital) -> None:
    study = hospital.study(name="private", privacy=PRIVACY)
    release = hospital.release(study)
    hospital.charge(study)
    page = hospital.report(release, hospital.audit(release))
    store = open_store(hospital.site.store_path)
    planted = {row.split(",")[0] for row in PLANTED_ROWS} | {row.split(",")[1] for row in PLANTED_ROWS}
    for private in (*planted, *store.pseudonyms, "DORA", "row 8", ".dcm", "31337", "41337", "51337"):
        assert private.lower() not in page.lower()
    for folder in (hospital.site.data.root, hospital.site.store, str(hospital.folder), hospital.site.base_model):
        assert folder not in page
    assert not re.search(r"https?:|<script|<link|<img|@import|url\(", page)


def test_secure_aggregation_is_reported_as_it_was_run(hospital: Hospital) -> None:
    study = hospital.study(name="secure")
    study = replace(study, federation=replace(study.federation, secure_aggregation=True))
    said = words(hospital.report(hospital.release(study)))
    assert "without differential privacy, with secure aggregation" in said
    assert "as one masked vector" in said
    assert "fewer than 3 of 3 collude" in said
    assert "two losses, the seconds it took withheld" in said


@pytest.mark.slow
def test_what_the_facts_give_is_warned_of(hospital: Hospital) -> None:
    study = hospital.study(name="private", privacy=PRIVACY)
    release = hospital.release(study)
    assert "holds no charge of this study" in words(hospital.report(release))
    drift = "holds no charge for it"
    weak = "charged for more noise"
    planned = study.privacy_plan().step
    noisier = replace(planned, noise_multiplier=2 * planned.noise_multiplier, steps=2)
    Ledger(hospital.site.ledger_path).charge(Use(study.name, study.digest(), 1, {TRAINING: noisier}), 1e9, 1e-5)
    said = words(hospital.report(release))
    assert drift in said
    assert weak in said
    hospital.site.ledger_path.unlink()
    hospital.charge(study)
    said = words(hospital.report(release))
    assert drift not in said
    assert weak not in said
    hospital.site.ledger_path.unlink()
    hospital.charge(study, 2)
    assert "no charge for round 1," in words(hospital.report(release))
    for _ in range(6):
        hospital.charge(study)
    hospital.charge(hospital.study(name="earlier"))
    leaking = hospital.audit(
        release,
        membership=(membership([2.0, 3.0] * 60, [0.0, 1.0] * 60),),
        canaries=EpsilonBound(9.0, 9.5, 1e-5, 0.95, 40_000, 20_000, 19_998, (40_000, 20_000)),
    )
    tight = replace(hospital.site, policy=replace(hospital.site.policy, max_epsilon=1.0))
    said = words(hospital.report(release, leaking, tight))
    for expected in (
        "more than the 1.99",
        "above the site's limit 1",
        "Studies without differential privacy used the same patients (earlier)",
        "better than chance (section 7)",
    ):
        assert expected in said
    assert any("at least 9.00" in warning and "1.99" in warning for warning in hospital.facts.warnings)


def test_an_altered_statement_is_found_out(hospital: Hospital) -> None:
    study = hospital.study(name="private", privacy=PRIVACY)
    release = hospital.release(study)
    manifest = json.loads((release / "manifest.json").read_text())
    manifest["privacy"]["epsilon"] = 0.5
    (release / "manifest.json").write_text(json.dumps(manifest))
    assert "states ε 0.5" in words(hospital.report(release))
    manifest["privacy"] = {"differential_privacy": False}
    (release / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ReleaseError, match=r"privacy\.enabled=True"):
        hospital.report(release)


def test_another_sites_release_and_another_releases_audit_are_refused(hospital: Hospital) -> None:
    release = hospital.release(hospital.study(name="open"))
    with pytest.raises(ReleaseError, match=r"'dahlia'.* aster, birch"):
        hospital.report(release, site=replace(hospital.site, site="dahlia"))
    with pytest.raises(AuditError, match="another adapter"):
        hospital.report(release, hospital.audit(release, adapter_sha256="0" * 64))
    with pytest.raises(AuditError, match=r"'birch'.*'aster'"):
        hospital.report(release, hospital.audit(release, site="birch"))
    broken = hospital.audit(release)
    for text in ("{", "[]", "{}", broken.read_text().replace('"members": 120', '"members": "many"')):
        broken.write_text(text)
        with pytest.raises(AuditError, match="audit-privacy again"):
            hospital.report(release, broken)
    with pytest.raises(AuditError, match="cannot be read"):
        hospital.report(release, hospital.folder / "absent.json")


def test_the_command_writes_the_page_and_says_where(
    hospital: Hospital, site_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release, out = hospital.release(hospital.study(name="open")), hospital.folder / "new/report.html"
    command = ["privacy-report", f"--config={site_yaml}", f"--release={release}", f"--out={out}"]
    with pytest.raises(SignatureError, match="not signed"):
        app(command, standalone_mode=False)
    app([*command, "--allow-unsigned"], standalone_mode=False)
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert f"wrote {out}: 3 points to weigh" in capsys.readouterr().out
