"""From the options of a command to a release, its model and an editor."""

from __future__ import annotations

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.core.config import load_config
from ld_common.core.errors import ModelError
from ld_common.diffusion.base_model import BaseModel, locate_base
from ld_common.editing.base import Editor
from ld_common.editing.registry import change_editor
from ld_common.release.release import Release, load_release_base, release_editor
from ld_common.release.trusted_keys import read_trusted_release
from ld_generate.console import print_note
from ld_generate.options import EditorOptions, LoadOptions


def open_release(options: LoadOptions) -> Release:
    """Read a release and print what the user must know of its signature, and of a site's part of it.

    Raises:
        SignatureError: unsigned, altered, or signed by a key that is not trusted.
        ReleaseError: incomplete or damaged, or without the part of `--site`.
    """
    release, notes = read_trusted_release(options.release, options.trust, options.allow_unsigned)
    for note in notes:
        print_note(note)
    if not options.site:
        return release
    own = release.of_site(options.site)
    if release.manifest.get("evaluation"):
        print_note(f"the release's evaluation is of the adapter of all sites, not of that of '{own.site}'")
    return own


def choose_editor(release: Release, options: EditorOptions) -> Editor:
    """The editor that the release recommends, or another one, with the options of the command line.

    Raises:
        ConfigError: an unknown option, or a value out of range.
    """
    recommended = release_editor(release)
    editor = change_editor(recommended, options.editor) if options.editor else recommended
    return load_config(type(editor), None, options.changes, start=editor)


def load_model(release: Release, options: LoadOptions) -> BaseModel:
    """The base model with the release's adapter.

    Raises:
        ModelError: the base is not on this machine, or cannot be loaded on this device.
        ReleaseError: the base is another one than the release was trained on.
    """
    if options.base is not None:
        try:
            locate_base(options.base)
        except ModelError as error:
            raise ModelError(f"--base: {error}") from error
    return load_release_base(release, options.base, options.device, options.precision)
