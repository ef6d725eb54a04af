"""`ld-generate sample`: pictures drawn from noise, of no patient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from ld_common.core.command import loading, progress_bar
from ld_common.core.config import require
from ld_common.core.errors import RequestError
from ld_common.protocol.site_name import AUTO, RELEASE
from ld_generate.console import status
from ld_generate.options import SAMPLERS, LoadOptions, OutputOptions, check_attributes


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What is drawn, and how."""

    source: Annotated[
        str,
        typer.Option(metavar="ATTR=VALUE,...", help="All attributes of the pictures.", show_default=False),
    ]
    samples: Annotated[int, typer.Option(min=1, help="Number of pictures.")] = 4
    sampler: Annotated[str, typer.Option(help=f"{', '.join(SAMPLERS)}.")] = SAMPLERS[0]
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the sampler. By default those of the release's editor.")
    ] = None
    drift: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Drift of the noise: '{RELEASE}', a site's name, or a shift δ such as -0.1. Repeatable: writes a "
            f"column each, from the same noise. By default {RELEASE}.",
            show_default=False,
        ),
    ] = None

    def __post_init__(self) -> None:
        require(self.sampler in SAMPLERS, f"--sampler is '{self.sampler}': use {', '.join(SAMPLERS)}")
        if AUTO in (self.drift or []):
            raise RequestError(f"--drift {AUTO} searches with edits of scans: use ld-generate edit")


def sample(load_options: LoadOptions, options: SampleOptions, output: OutputOptions) -> None:
    """Draw pictures from noise that have the given attributes, one row a noise and one column a drift.

    Example: ld-generate sample RELEASE --source age=74,sex=F,diagnosis=CN --drift release --drift 0
    """
    check_attributes(load_options, [], options.source)
    with loading(status):
        from ld_common.release.release import release_editor
        from ld_generate.drift_choice import choose_drifts
        from ld_generate.loading import load_model, open_release
        from ld_generate.report import print_results
        from ld_generate.samples import SampleRequest, draw_samples

    release = open_release(load_options)
    request = SampleRequest(
        source=release.modality.parse_all(options.source),
        drifts=choose_drifts(release, options.drift or [RELEASE]),
        count=options.samples,
        sampler=options.sampler,
        num_inference_steps=options.num_inference_steps or release_editor(release).num_inference_steps,
        watermark=output.watermark,
    )
    model = load_model(release, load_options)
    with progress_bar(status, "drawing", options.samples * len(request.drifts)) as advance:
        files = draw_samples(model, release, request, output.out, advance)
    print_results(files, output.as_json)
