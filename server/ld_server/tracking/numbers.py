"""The numbers of a round that trackers draw as curves."""

from __future__ import annotations

from ld_server.round_log import RoundRecord

OF_A_SITE = ("loss_first", "loss_last", "update_norm", "uplink_bytes", "visits", "patients", "seconds")
"""Keys of a site's entry in a record; None where the study withholds the number."""


def round_numbers(record: RoundRecord) -> dict[str, float]:
    """Numbers by name: `loss_last/SITE` of a site, `mean/loss_last` over sites, `round/seconds` of the round.

    What a private study or secure aggregation withholds is not in the record, and is left out.
    """
    sent = [entry["uplink_bytes"] for entry in record.sites.values() if entry.get("uplink_bytes") is not None]
    numbers = {
        "round/counted": float(record.counted),
        "round/seconds": record.seconds,
        "round/sites": float(len(record.sites)),
        "round/left_out": float(len(record.left_out)),
        "round/uplink_bytes": float(sum(sent)),
    }
    for key in ("loss_first", "loss_last"):
        mean = mean_over_sites(record, key)
        numbers |= {} if mean is None else {f"mean/{key}": mean}
    if record.mean_update_norm is not None:
        numbers["mean/update_norm"] = record.mean_update_norm  # the norm of the mean update
    numbers |= {f"mean/validation_{name}": value for name, value in record.validation_mean.items()}
    for site, entry in record.sites.items():
        numbers |= {f"{key}/{site}": float(entry[key]) for key in OF_A_SITE if entry.get(key) is not None}
    for site, scores in record.validation.items():
        numbers |= {f"validation_{name}/{site}": value for name, value in scores.items()}
    return numbers


def mean_over_sites(record: RoundRecord, key: str) -> float | None:
    """The plain mean over a record's sites; None where no site has the number."""
    values = [float(entry[key]) for entry in record.sites.values() if entry.get(key) is not None]
    return sum(values) / len(values) if values else None
