"""`ld-generate`: how would this scan look if the patient were older, of the other sex, ill, or well?"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import typer
from rich.console import Console

from ld_common.core.command import TRUST_HELP, UNSIGNED_HELP, loading, run_cli
from ld_common.core.errors import RequestError
from ld_common.editing.registry import EDITORS
from ld_common.protocol.site_name import AUTO, RELEASE
from ld_generate.web.cli import cli as page

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()


@cli.command(epilog="A local web page of a release, in place of all this: ld-generate serve --help")
def generate(
    release: Path = typer.Option(..., help="Folder of a release."),
    inputs: list[Path] = typer.Option([], "--input", help="DICOM file or series folder, NIfTI or PNG; repeatable."),
    sets: list[str] = typer.Option([], "--set", help="attribute=value,... of one counterfactual; repeatable."),
    batch: Path | None = typer.Option(None, help="In place of --input and --set: a CSV with a row a scan."),
    volume: bool = typer.Option(False, "--volume", help="Edit volumes whole: NIfTI files, folders of a DICOM series."),
    slices: str = typer.Option(
        "", help="With --volume, first:last, from 0: what is edited. By default a twentieth of all."
    ),
    trajectory: str = typer.Option("", help="attribute=first:last:step: a strip, an animation and a table."),
    seeds: int = typer.Option(1, help="Draw each answer so often: their mean, their deviation, and all of them."),
    mask: Path | None = typer.Option(None, help="An image of the scan's size: what is not 0 in it stays as it is."),
    mark: bool = typer.Option(False, "--mark", help="Write the word synthetic into the pixels of what is drawn."),
    drift: list[str] = typer.Option(
        [RELEASE], help="release, a site's name, auto, or a shift of z_T such as -0.1; repeatable: a strip."
    ),
    samples: int = typer.Option(4, help="Without --input: pictures drawn from noise."),
    sampler: str = typer.Option("ddim", help="Without --input: ddim, dpm-solver++ or euler."),
    given: str = typer.Option("", help="attribute=value,... that the files do not say."),
    slice_index: int | None = typer.Option(None, "--slice", help="Slice of a volume; by default the trained one."),
    out: Path = typer.Option(Path("counterfactuals"), help="Folder for the results."),
    base: str | None = typer.Option(None, help="Base model, if not where the release says."),
    trust: str = typer.Option("", help=TRUST_HELP),
    allow_unsigned: bool = typer.Option(False, "--allow-unsigned", help=UNSIGNED_HELP),
    released: bool = typer.Option(False, help="A person has checked the inputs for burned-in text (DERIVED images)."),
    editor: str = typer.Option("", help=f"{', '.join(EDITORS)}. By default as the release recommends."),
    guidance_scale: float | None = typer.Option(
        None, help="Strength of the edit; 0 changes nothing. By default as the release recommends."
    ),
    noise_fraction: float | None = typer.Option(
        None, help="Share of the diffusion that is inverted, above 0 and up to 1. By default as the release recommends."
    ),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    precision: str = typer.Option("float32", help="float32, bfloat16 or float16."),
    overrides: list[str] = typer.Argument(None, help="key=value of the editor, for example num_inference_steps=80."),
) -> None:
    """Draw counterfactuals of scans: PNG and synthetic DICOM, the reconstruction, difference maps, a record.

    With --volume, volumes of the input's geometry: the slices near the one that the release was trained on are edited,
    all others stay the input's.

    Without --input, draw pictures of no patient with the attributes of --given.
    """
    if volume and (batch is not None or not inputs or trajectory or slice_index is not None or seeds != 1):
        raise RequestError("--volume is of --input and --set, without --batch, --trajectory, --slice and --seeds")
    if slices and not volume:
        raise RequestError("--slices says which slices of a --volume are edited: give that as well, or one --slice")
    if batch is not None and (
        inputs or sets or trajectory or mask or drift != [RELEASE] or seeds != 1 or slice_index is not None
    ):
        raise RequestError("--batch says itself which scans and edits: beside it, --given alone does")
    if batch is None and not inputs and (trajectory or mask or seeds != 1 or slice_index is not None):
        raise RequestError("--trajectory, --mask, --seeds and --slice are of a scan: name one with --input")
    if volume and (AUTO in drift or len(drift) != 1):
        raise RequestError("--volume is drawn under one drift: give --drift once, and not auto")
    if trajectory and len(drift) > 1:
        raise RequestError("--trajectory is drawn under one drift: give --drift once, or --set for each value")
    with loading(console):
        from ld_common.core.config import load_config
        from ld_common.editing.registry import change_editor
        from ld_common.release.release import load_release_base, release_editor
        from ld_common.release.trusted_keys import read_trusted_release
        from ld_generate import runner
        from ld_generate.attribute_sweep import read_sweep
        from ld_generate.drift_choice import choose_drifts
        from ld_generate.request import make_folders, read_requests
        from ld_generate.volume import read_volume_requests

    named = {"guidance_scale": guidance_scale, "noise_fraction": noise_fraction}
    extra = [f"{key}={value}" for key, value in named.items() if value is not None]
    loaded, notes = read_trusted_release(release, trust, allow_unsigned)
    recommended = release_editor(loaded)
    chosen = change_editor(recommended, editor) if editor else recommended
    config = load_config(type(chosen), None, [*(overrides or []), *extra], start=chosen)
    known = loaded.modality.parse_all(given)
    model = load_release_base(loaded, base, device, precision)
    if batch is not None:
        files = runner.draw_rows(model, loaded, batch, known, released, config, out, mark)
    elif not inputs:
        files = runner.draw_pictures(
            model, loaded, known, sets, drift, samples, config.num_inference_steps, sampler, out, mark
        )
    elif volume:
        (delta,) = runner.edit_deltas(choose_drifts(loaded, drift), config.delta)
        targets = runner.read_targets(loaded.modality, sets)
        volumes = read_volume_requests(
            loaded.modality, model.resolution, inputs, targets, known, slices, released, out, mask, mark
        )
        files = runner.edit_volumes(model, loaded, volumes, dataclasses.replace(config, delta=delta))
    else:
        targets = runner.read_targets(loaded.modality, sets, needed=not trajectory)
        along = read_sweep(loaded.modality, trajectory) if trajectory else None
        if seeds < 1 or (seeds > 1 and not config.draws_noise()):
            drawing = ", ".join(name for name in EDITORS if EDITORS.load(name).draws_noise())
            raise RequestError(f"--seeds {seeds}: give 1, or more with an --editor that draws noise: {drawing}")
        questions = read_requests(
            loaded.modality, model.resolution, inputs, targets, known, slice_index, released, out, along, mask, mark
        )
        deltas = runner.edit_deltas(choose_drifts(loaded, [word for word in drift if word != AUTO]), config.delta)
        make_folders(questions)
        deltas += [runner.search_delta(model, loaded, questions, config)] if AUTO in drift else []
        files = runner.edit_scans(model, loaded, questions, config, list(dict.fromkeys(deltas)), seeds)
    for note in [*notes, *runner.warnings_of(files)]:
        console.print(note, soft_wrap=True, highlight=False, markup=False)
    for folder in sorted({file.parent for file in files}) if batch is None else []:
        console.print(f"wrote {folder}: {len([file for file in files if file.parent == folder])} files")


def main() -> None:
    """Entry point of `ld-generate`, and of `ld-generate serve`."""
    run_cli(page if sys.argv[1:2] == ["serve"] else cli)
