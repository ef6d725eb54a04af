"""How many sites of a simulation train at once."""

from __future__ import annotations

import pytest

from ld_simulations.federation import SITE_MEGABYTES, sites_at_once

MUCH = 10.0**6


@pytest.mark.parametrize(
    ("sites", "processors", "at_once"),
    [(1, 4, 1), (2, 2, 2), (3, 2, 3), (4, 2, 2), (5, 2, 5), (6, 4, 6), (8, 4, 4), (3, 16, 3), (10, 1, 1)],
)
def test_no_processor_is_idle_at_the_end_of_a_round(sites: int, processors: int, at_once: int) -> None:
    assert sites_at_once(sites, processors, MUCH) == at_once


def test_memory_bounds_the_sites_at_once() -> None:
    assert sites_at_once(3, 2, 3 * SITE_MEGABYTES) == 3
    assert sites_at_once(3, 2, 3 * SITE_MEGABYTES - 1) == 2
