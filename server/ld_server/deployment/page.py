"""`ld-server page`: a run for those who look after it, as a read-only page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ld_common.core.errors import CheckpointError
from ld_common.page.content import (
    Cell,
    Curve,
    Curves,
    DataTable,
    Facts,
    Marked,
    PageContent,
    PageSection,
    Part,
    Sentence,
    bytes_text,
    number_text,
    time_text,
)
from ld_common.page.document import document
from ld_common.protocol.messages import LOSS
from ld_common.protocol.study_config import StudyConfig
from ld_server.deployment.run_log import FLOWER_LOG
from ld_server.deployment.status import (
    ADMITTED,
    RUNNING,
    SIMULATED,
    RunStatus,
    SiteStatus,
    ranges,
    run_status,
)
from ld_server.deployment.watched_run import WatchedRun
from ld_server.round_log import RELEASE, RoundRecord
from ld_server.tracking.numbers import mean_over_sites
from ld_server.tracking.rounds_csv import ROUNDS_CSV
from ld_server.tracking.tensorboard_files import FOLDER
from ld_server.validation import best_round

SHOWN_ROUNDS, NAMED_SITES = 50, 5
WITHHELD = "This study withholds the sites' losses (differential privacy or secure aggregation)."


class RunPage:
    """The page of one run. The log of the rounds is read when it has changed, the checkpoint when no run holds it."""

    def __init__(self, run: WatchedRun) -> None:
        self.run = run
        self._seen: tuple[int, ...] | None = None
        self._records: list[RoundRecord] = []
        self._checked: tuple[int, ...] | None = None
        self._notes: list[str] = []

    @classmethod
    def of(cls, place: Path) -> RunPage:
        """The page of a study's home, of a run's folder, or of an output folder of `ld-simulate`."""
        return cls(WatchedRun.find(place))

    def render(self) -> str:
        """The page as it is now; raises `LdError`."""
        study, status = self._read()
        return document(run_content(study, status, self._records, self._files()))

    def _read(self) -> tuple[StudyConfig, RunStatus]:
        study, version = self.run.study(), self.run.version()
        admitted = None if self.run.home is None else self.run.home.sites()
        if not self.run.is_running() and version != self._checked:
            self._notes = self._checkpoint_notes()
            self._checked = version
        if version != self._seen:
            self._records, self._seen = self.run.rounds(), version
        return study, run_status(self.run.folder, study, admitted, self._records, self._notes)

    def _checkpoint_notes(self) -> list[str]:
        """What is wrong with the checkpoint, which takes a while to read when it is large."""
        try:
            return self.run.status().notes
        except CheckpointError as error:
            return [str(error)]

    def _files(self) -> list[tuple[str, Cell]]:
        """What else stands in the folders."""
        folder, home = self.run.folder, self.run.home
        named = [
            ("Release", folder / RELEASE, ""),
            ("Rounds as a table", folder / ROUNDS_CSV, ""),
            ("TensorBoard", folder / FOLDER, "tensorboard --logdir "),
            ("Flower's log of the run", folder / FLOWER_LOG, ""),
        ]
        if home is not None:
            named.append(("Flower's log of the server", home.path / "link.log", ""))
        return [(name, f"{before}{path}") for name, path, before in named if path.exists()]


def run_content(
    study: StudyConfig, status: RunStatus, records: Sequence[RoundRecord], files: Sequence[tuple[str, Cell]]
) -> PageContent:
    """What the page of a run shows."""
    total = sum(entry["uplink_bytes"] for record in records for entry in record.sites.values())
    last, best = status.last_round, best_round(records)
    overview: list[tuple[str, Cell]] = [
        ("Rounds", f"{status.rounds_done} of {status.rounds}"),
        ("Last round ended (UTC)", "no round has ended yet" if last is None else time_text(last.ended)),
        ("Sites in the last round", "–" if last is None else f"{len(last.sites)} of {len(status.sites)}"),
        ("Received from the sites so far", bytes_text(total)),
    ]
    if best is not None:
        lowest = f"{number_text(best.validation_mean[LOSS])} in round {best.round}"
        overview.append(("Lowest validation loss", lowest))
    names = study.federation.sites
    where = ", ".join(names) if len(names) <= NAMED_SITES else f"{len(names)} sites"
    return PageContent(
        title=f"Study {study.name}",
        about=f"Round {status.rounds_done} of {status.rounds} at {where}",
        state=_state(status),
        notices=_notices(status),
        sections=[
            PageSection("Overview", [Facts([*overview, *files])]),
            PageSection("Sites", [_sites_table(status, records)]),
            PageSection("Left out", _left_out(status, records)),
            PageSection("Curves", _curves(study, records)),
            PageSection("Rounds", _rounds(records, len(status.sites))),
            PageSection("Privacy", _privacy(study)),
        ],
    )


def _state(status: RunStatus) -> Marked:
    """The run's state in a few words; the whole sentence of a failure is a notice."""
    if status.state == RUNNING:
        return Marked(f"Running: round {min(status.rounds_done + 1, status.rounds)} of {status.rounds}", "good")
    if status.state.startswith("failed"):
        return Marked("Failed", "bad")
    if status.ended:
        return Marked("Ended, the release is written", "good")
    return Marked("Stopped before its end", "warn") if status.rounds_done else Marked("Not running", "plain")


def _notices(status: RunStatus) -> list[Marked]:
    notices = [Marked(note, "warn") for note in status.notes]
    if status.state.startswith("failed"):
        notices.insert(0, Marked(status.state[0].upper() + status.state[1:], "bad"))
    elif status.state.startswith("stopped"):
        how = status.state.partition(": ")[2]
        notices.insert(0, Marked(f"It can {how}.", "warn"))
    last = status.last_round
    if last is not None and not last.counted:
        notices.append(Marked(f"Round {last.round} did not count: {last.failure}", "warn"))
    if last is not None and last.unknown_nodes:
        nodes = ", ".join(last.unknown_nodes)
        notices.append(Marked(f"Connected nodes that belong to no admitted site, and get nothing: {nodes}", "warn"))
    for site in status.sites:
        notices += [Marked(f"Audit log of {site.name}: {problem}", "bad") for problem in site.log_problems]
    return notices


def _sites_table(status: RunStatus, records: Sequence[RoundRecord]) -> DataTable:
    columns = ["Site", "Admission", "Last result", "#Rounds", "#Loss", "#Validation", "#Update norm", "#Sent", "Data"]
    if all(site.admission == SIMULATED for site in status.sites):
        columns.remove("Admission")
    rows = [_site_row(site, records, "Admission" in columns) for site in status.sites]
    return DataTable("Each site and its last accepted result", columns, rows, "The study names no site.")


def _site_row(site: SiteStatus, records: Sequence[RoundRecord], admission: bool) -> list[Cell]:
    accepted = [record for record in records if site.name in record.sites]
    entry: dict[str, Any] = accepted[-1].sites[site.name] if accepted else {}
    scores = next((record.validation[site.name] for record in reversed(records) if site.name in record.validation), {})
    marked: Cell = site.admission if site.admission == ADMITTED else Marked(site.admission, _admission_mark(site))
    head: list[Cell] = [site.name, *([marked] if admission else [])]
    if site.last_round is None:
        return [*head, Marked("none yet", "warn"), "", "", "", "", "", ""]
    norm: Cell = number_text(site.update_norm) if site.update_norm is not None else "hidden in the sum"
    data = "withheld" if site.visits is None else f"{site.visits:,} visits of {site.patients:,} patients"
    return [
        *head,
        f"round {site.last_round}, {time_text(site.ended or '')}",
        f"{len(accepted)} of {len(records)}",
        "withheld" if entry.get("loss_last") is None else number_text(entry["loss_last"]),
        number_text(scores.get(LOSS)),
        f"{norm}, clipped" if site.clipped else norm,
        bytes_text(sum(record.sites[site.name]["uplink_bytes"] for record in accepted)),
        data,
    ]


def _admission_mark(site: SiteStatus) -> str:
    return "bad" if site.admission.startswith("revoked") else "warn"


def _left_out(status: RunStatus, records: Sequence[RoundRecord]) -> list[Part]:
    rows = [[entry.site, ranges(entry.rounds), entry.reason] for entry in status.left_out]
    parts: list[Part] = [
        DataTable("Sites whose result did not count", ["Site", "Rounds", "Reason"], rows, "No site was left out.")
    ]
    failures = [[str(record.round), record.failure] for record in records if not record.counted]
    if failures:
        parts.append(DataTable("Rounds that did not count", ["Round", "Reason"], failures, ""))
    unscored = _grouped((record.round, site, why) for record in records for site, why in record.not_validated.items())
    if unscored:
        parts.append(DataTable("Sites without a validation", ["Site", "Rounds", "Reason"], unscored, ""))
    return parts


def _grouped(entries: Iterable[tuple[int, str, str]]) -> list[list[str]]:
    """Rows of site, rounds and reason."""
    rounds: dict[tuple[str, str], list[int]] = {}
    for number, site, reason in entries:
        rounds.setdefault((site, reason), []).append(number)
    return [[site, ranges(numbers), reason] for (site, reason), numbers in sorted(rounds.items())]


def _curves(study: StudyConfig, records: Sequence[RoundRecord]) -> list[Part]:
    losses = _site_curves(records, "loss_last")
    mean = [(record.round, value) for record in records if (value := mean_over_sites(record, "loss_last")) is not None]
    scores: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for site, found in record.validation.items():
            if LOSS in found:
                scores.setdefault(site, []).append((record.round, found[LOSS]))
    validated = _means(records, LOSS)
    summed = [(record.round, record.mean_update_norm) for record in records if record.mean_update_norm is not None]
    norms = [Curve("mean update", summed, main=True)] if summed else _site_curves(records, "update_norm")
    empty = WITHHELD if study.withholds_numbers and records else "No round has ended yet."
    gains = [
        Curve("the drift", _means(records, "followup_gain_db"), main=True),
        Curve("the same change for all", _means(records, "same_for_all_gain_db")),
    ]
    followed = [Curves("Follow-ups predicted: gain over copying, dB", gains, "")] if gains[0].points else []
    return [
        Curves("Training loss, last fifth of a round", [Curve("mean of sites", mean, main=True), *losses], empty),
        Curves(
            "Validation loss on held-out patients",
            [
                Curve("mean of sites", validated, main=True),
                *(Curve(site, points) for site, points in sorted(scores.items())),
            ],
            "No site has sent a validation loss." if records else "No round has ended yet.",
        ),
        *followed,
        Curves("Norm of the updates", norms, "No round has ended yet."),
    ]


def _means(records: Sequence[RoundRecord], score: str) -> list[tuple[int, float]]:
    """A score of the validations, over sites."""
    return [(record.round, record.validation_mean[score]) for record in records if score in record.validation_mean]


def _site_curves(records: Sequence[RoundRecord], key: str) -> list[Curve]:
    points: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for site, entry in record.sites.items():
            if entry.get(key) is not None:
                points.setdefault(site, []).append((record.round, float(entry[key])))
    return [Curve(site, values) for site, values in sorted(points.items())]


def _rounds(records: Sequence[RoundRecord], sites: int) -> list[Part]:
    columns = ["Round", "Ended (UTC)", "#Seconds", "Sites", "#Loss, first to last", "#Validation", "#Sent", "Outcome"]
    rows = [_round_row(record, sites) for record in reversed(records[-SHOWN_ROUNDS:])]
    table = DataTable("Rounds, the newest first", columns, rows, "No round has ended yet.")
    older = len(records) - len(rows)
    return [table, Sentence(f"The {older} rounds before stand in {ROUNDS_CSV}.")] if older else [table]


def _sites_text(names: Iterable[str], all_sites: int) -> str:
    """Names of a few sites, the number of many."""
    listed = list(names)
    if not listed:
        return "none"
    return ", ".join(listed) if all_sites <= NAMED_SITES else f"{len(listed)} of {all_sites} sites"


def _round_row(record: RoundRecord, sites: int) -> list[Cell]:
    first, last = (mean_over_sites(record, key) for key in ("loss_first", "loss_last"))
    loss = "–" if first is None else f"{number_text(first)} → {number_text(last)}"
    missing = f"; without {', '.join(record.left_out)}" if record.left_out else ""
    counted = Marked(f"counted{missing}", "warn" if missing else "good")
    return [
        str(record.round),
        time_text(record.ended),
        f"{record.seconds:,.0f}",
        _sites_text(record.sites, sites),
        loss,
        number_text(record.validation_mean.get(LOSS)),
        bytes_text(sum(entry["uplink_bytes"] for entry in record.sites.values())),
        counted if record.counted else Marked(f"did not count: {record.failure}{missing}", "bad"),
    ]


def _privacy(study: StudyConfig) -> list[Part]:
    federation, privacy = study.federation, study.privacy
    facts: list[tuple[str, Cell]] = []
    if privacy.enabled:
        facts += [
            ("Differential privacy", "yes; unit: one patient of one site; horizon: all rounds of the study"),
            ("ε of the whole study", f"{privacy.target_epsilon:g} at δ {privacy.target_delta:g}"),
        ]
    else:
        facts.append(("Differential privacy", Marked("no: nothing bounds what it reveals about a patient", "warn")))
    facts.append(("Secure aggregation", "yes" if federation.secure_aggregation else "no: the server sees each update"))
    ledger = "What a site has spent stands in its own ledger, which never leaves it: ld-client page shows it there."
    return [Facts(facts), Sentence(ledger)]
