"""`ld-client page`: what runs and ran at this site, as a read-only page for its data manager.

It names no patient and no file: exclusions are counted, and the audit log holds neither.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ld_client.data.exclusions import read_exclusions
from ld_client.data.store_index import INDEX
from ld_client.data.withdrawals import read_withdrawals
from ld_client.deployment.approvals import last_approval
from ld_client.deployment.audit_log import LogEntry, log_entries
from ld_client.deployment.audit_verify import verify_home
from ld_client.deployment.site_home import SiteHome
from ld_client.privacy.ledger import DRIFT, TRAINING, Ledger, LedgerEntry, by_study, private_charges
from ld_client.site_config import SiteConfig
from ld_client.site_rounds import TRAIN, SiteRound, sent_bytes, sent_words, site_rounds
from ld_common.core.errors import ApprovalError, DeploymentError, PrivacyError, StoreError
from ld_common.page.content import (
    Cell,
    Curve,
    Curves,
    DataTable,
    Facts,
    Marked,
    Meter,
    PageContent,
    PageSection,
    Part,
    Sentence,
    bytes_text,
    number_text,
    time_text,
)
from ld_common.page.document import document
from ld_common.protocol.dp_accounting import Charge, epsilon

SHOWN = 500
"""Newest entries of a table."""
NODE_LOCK = "node.lock"
NOT_LEFT = "A site without a home keeps no log of what left: ld-client init makes one when it joins a study."


class SitePage:
    """The page of a site with a home, or of a site's config alone. A log that did not change is not read again."""

    def __init__(self, site: SiteConfig, home: SiteHome | None) -> None:
        self.site, self.home = site, home
        self._seen: tuple[int, int] | None = None
        self._log: list[LogEntry] = []
        self._problems: list[str] = []
        self._indexed: tuple[int, int] | None = None
        self._reasons: dict[str, tuple[int, int]] = {}

    def render(self) -> str:
        """The page as it is now; raises `LdError`."""
        notices: list[Marked] = []
        log = self._read_log(notices)
        rounds = site_rounds(log)
        sections = [
            PageSection("Overview", self._overview(log, notices)),
            PageSection("Privacy budget", self._budget(notices)),
            PageSection("Rounds", self._rounds(rounds)),
            PageSection("What left the site", self._left(log)),
            PageSection("Refusals", self._refusals(log)),
            PageSection("Excluded from training", self._exclusions(notices)),
        ]
        return document(
            PageContent(
                title=f"Site {self.site.site}",
                about="This hospital's part in studies, from its own records. Nothing of this page leaves the machine.",
                state=self._state(rounds),
                notices=notices,
                sections=sections,
            )
        )

    def _read_log(self, notices: list[Marked]) -> list[LogEntry]:
        """The log's entries, verified each time that it has changed."""
        if self.home is None or not self.home.audit_log.exists():
            return []
        written = self.home.audit_log.stat()
        version = written.st_mtime_ns, written.st_size
        if version != self._seen:
            self._log, self._problems = [], verify_home(self.home).problems
            with contextlib.suppress(DeploymentError):  # a line that is no entry is among the problems
                self._log = log_entries(self.home.audit_log)
            self._seen = version
        if self._problems:
            said = f"The audit log was altered ({len(self._problems)} problems, the first: {self._problems[0]})"
            notices.append(Marked(f"{said}: keep a copy, and run ld-client audit verify", "bad"))
        return self._log

    def _state(self, rounds: Sequence[SiteRound]) -> Marked:
        if self.home is None:
            return Marked("A site without a home", "plain")
        if not is_held(self.home.path / NODE_LOCK):
            return Marked("Not taking part now", "plain")
        last = rounds[-1] if rounds else None
        if last is not None and last.refused:
            return Marked(f"Takes part; round {last.number} was refused", "warn")
        return Marked("Takes part in the study", "good")

    def _overview(self, log: Sequence[LogEntry], notices: list[Marked]) -> list[Part]:
        facts: list[tuple[str, Cell]] = []
        if self.home is not None:
            kit = self.home.kit()
            facts += [("Study", kit.study), ("Server", kit.server), ("Approval", self._approval(notices))]
        sent = [entry for entry in log if entry.event == "left" and entry.details.get("kind") == TRAIN]
        asked = [entry for entry in log if entry.event == "asked"]
        if asked:
            facts.append(("Last request of the server (UTC)", time_text(asked[-1].time)))
        if sent:
            facts.append(("Last update sent (UTC)", time_text(sent[-1].time)))
        try:
            count = len(read_withdrawals(self.site.store_path))
            facts.append(("Patients who withdrew consent", str(count)))
        except StoreError as error:
            notices.append(Marked(str(error), "bad"))
        if log:
            last = f"{len(log):,} entries, the last of {time_text(log[-1].time)} UTC"
            altered = Marked(f"{last}, altered", "bad")
            facts.append(("Audit log", altered if self._problems else f"{last}; chain and signatures are whole"))
        return [Facts(facts)]

    def _approval(self, notices: list[Marked]) -> Cell:
        home = self.home
        if home is None:
            return ""
        try:
            approval = last_approval(home)
        except (ApprovalError, DeploymentError) as error:
            notices.append(Marked(str(error), "bad"))
            return Marked("cannot be used", "bad")
        if approval is None:
            notices.append(Marked("Nothing is approved, so nothing runs here: ld-client approve", "warn"))
            return Marked("none", "warn")
        kit = home.kit()
        if (approval.bundle, approval.study) != (kit.bundle_digest, kit.study_digest):
            notices.append(Marked("The kit is newer than the approval: review it with ld-client approve", "warn"))
            return Marked(f"of an older kit, {time_text(approval.approved)} by {approval.by}", "warn")
        return f"{time_text(approval.approved)} by {approval.by}"

    def _budget(self, notices: list[Marked]) -> list[Part]:
        policy = self.site.policy
        try:
            entries = Ledger(self.site.ledger_path).entries()
        except PrivacyError as error:
            notices.append(Marked(str(error), "bad"))
            return [Sentence("The ledger cannot be read.")]
        charges = tuple(private_charges(entries))
        spent = spent_epsilon(charges, policy.delta) if charges else 0.0
        left = max(0.0, policy.max_epsilon - spent)
        limit = f"ε {policy.max_epsilon:g} at δ {policy.delta:g}"
        text = f"ε {spent:.4g} spent of {policy.max_epsilon:g} at δ {policy.delta:g}; {left:.4g} left"
        parts: list[Part] = [
            Meter("Spent for one patient, all studies together", spent, policy.max_epsilon, text)
            if charges
            else Sentence(f"Nothing is spent of this site's limit, {limit}."),
        ]
        if charges and not left:
            notices.append(Marked(f"The privacy budget is spent: rounds beyond {limit} are refused", "bad"))
        outside = sorted({entry.study for entry in entries if entry.charge is None})
        if outside:
            names = ", ".join(outside)
            parts.append(Sentence(f"Trained without differential privacy, so that no ε bounds what left: {names}."))
        columns = ["Study", "First charge (UTC)", "Last charge (UTC)", "#Rounds", "#Drifts", "Differential privacy"]
        rows = [_study_row(charged) for charged in by_study(entries).values()]
        parts.append(DataTable("Privacy ledger of this data set", columns, rows, "The ledger is empty."))
        return parts

    def _rounds(self, rounds: Sequence[SiteRound]) -> list[Part]:
        if self.home is None:
            entries = [entry for entry in Ledger(self.site.ledger_path).entries() if entry.purpose == TRAINING]
            rows: list[list[Cell]] = [
                [str(entry.round), time_text(entry.time), entry.study, "yes" if entry.charge else "no"]
                for entry in reversed(entries[-SHOWN:])
            ]
            columns = ["Round", "Charged (UTC)", "Study", "Differential privacy"]
            return [DataTable("Rounds that trained here, by the ledger", columns, rows, "No round has trained here.")]
        parts: list[Part] = []
        losses = [(entry.number, entry.losses[1]) for entry in rounds if entry.losses is not None]
        scores = [(entry.number, entry.validation) for entry in rounds if entry.validation is not None]
        if losses or scores:
            curves = [Curve("training, last fifth of a round", losses, main=True), Curve("held-out patients", scores)]
            parts.append(Curves("Loss of this site", curves, ""))
        columns = ["Round", "Time (UTC)", "Outcome", "#Patients", "#Visits", "#Loss, first to last", "#Validation"]
        table = [_round_cells(entry) for entry in reversed(rounds[-SHOWN:])]
        return [*parts, DataTable("Rounds of this site, the newest first", columns, table, "No round has run here.")]

    def _left(self, log: Sequence[LogEntry]) -> list[Part]:
        if self.home is None:
            return [Sentence(NOT_LEFT)]
        entries = [entry for entry in log if entry.event == "left"]
        total = sum(sent_bytes(entry) for entry in entries)
        rows = [
            [
                time_text(entry.time),
                str(entry.details.get("round", "–")),
                sent_words(entry),
                bytes_text(sent_bytes(entry)),
            ]
            for entry in reversed(entries[-SHOWN:])
        ]
        facts = Facts([("Messages", f"{len(entries):,}"), ("Together", bytes_text(total))])
        columns = ["Time (UTC)", "Round", "What", "#Bytes"]
        return [facts, DataTable("What left, the newest first", columns, rows, "Nothing has left this site.")]

    def _refusals(self, log: Sequence[LogEntry]) -> list[Part]:
        if self.home is None:
            return [Sentence(NOT_LEFT)]
        refused = [entry for entry in log if entry.event == "refused"]
        rows = [
            [
                time_text(entry.time),
                str(entry.details.get("round", "–")),
                str(entry.details.get("code", "")),
                str(entry.details.get("reason", "")),
            ]
            for entry in reversed(refused[-SHOWN:])
        ]
        columns = ["Time (UTC)", "Round", "Code that left", "Reason, which stays here"]
        return [DataTable("Requests that this site refused", columns, rows, "Nothing was refused.")]

    def _exclusions(self, notices: list[Marked]) -> list[Part]:
        try:
            reasons = self._count_exclusions()
        except StoreError as error:
            notices.append(Marked(str(error), "warn"))
            return [Sentence("There is no index of scans to read.")]
        rows = [[reason, f"{entries:,}", f"{files:,}"] for reason, (entries, files) in reasons.items()]
        table = DataTable("By reason", ["Reason", "#Entries", "#Files"], rows, "The last index excluded nothing.")
        return [table, Sentence("ld-client exclusions lists each file and row.")] if rows else [table]

    def _count_exclusions(self) -> dict[str, tuple[int, int]]:
        """Entries and files by reason, the most frequent first; an index that did not change is not read again."""
        index = self.site.store_path / INDEX
        version = (index.stat().st_mtime_ns, index.stat().st_size) if index.exists() else None
        if version is None or version != self._indexed:
            exclusions = read_exclusions(self.site.store_path)
            counts = Counter(entry.reason.value for entry in exclusions)
            files = Counter[str]()
            for entry in exclusions:
                files[entry.reason.value] += entry.files
            self._reasons = {reason: (count, files[reason]) for reason, count in counts.most_common()}
            self._indexed = version
        return self._reasons


def _study_row(charged: Sequence[LedgerEntry]) -> list[Cell]:
    private = any(entry.charge is not None for entry in charged)
    rounds, drifts = (sum(entry.purpose == purpose for entry in charged) for purpose in (TRAINING, DRIFT))
    first = charged[0]
    return [
        f"{first.study} ({first.study_digest[:12]})",
        time_text(first.time),
        time_text(charged[-1].time),
        str(rounds),
        str(drifts),
        "yes" if private else Marked("no", "warn"),
    ]


def _round_cells(entry: SiteRound) -> list[Cell]:
    losses = "withheld" if entry.losses is None else f"{number_text(entry.losses[0])} → {number_text(entry.losses[1])}"
    mark = "bad" if entry.refused else "warn" if "refused" in entry.outcome else "good"
    sent = f", {bytes_text(entry.sent_bytes)}" if entry.sent_bytes else ""
    return [
        str(entry.number),
        time_text(entry.time),
        Marked(entry.outcome + sent, mark) if entry.sent_bytes or entry.refused else entry.outcome,
        "" if entry.patients is None else f"{entry.patients:,}",
        "" if entry.visits is None else f"{entry.visits:,}",
        losses if entry.sent_bytes else "",
        number_text(entry.validation) if entry.validation is not None else "",
    ]


@functools.lru_cache(maxsize=4)
def spent_epsilon(charges: tuple[Charge, ...], delta: float) -> float:
    """ε of a ledger's charges, computed once for each state of the ledger: it takes a second."""
    return epsilon(list(charges), delta)


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock file."""
    try:
        with lock.open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
