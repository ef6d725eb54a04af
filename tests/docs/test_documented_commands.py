"""Every `ld-*` command line in the documentation, the Makefile and the configs exists, with each of its options."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from generators.commands import all_commands  # noqa: E402  (docs/ is not a package)

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "Makefile"]
PAGES += sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name != "commands.md")
PAGES += sorted((ROOT / "configs").rglob("*.yaml"))
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(ld-[a-z]+ [^`]*)`")
COMMAND = re.compile(r"(?:^|[\s/])(ld-(?:client|evaluate|generate|server|simulate|benchmark)(?: .*)?)$")


def command_lines(page: Path) -> Iterator[str]:
    """The command lines of a page: of its shell blocks and inline, or of any line where it is no Markdown."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    if page.suffix == ".md":
        yield from (" ".join(line.split()) for line in INLINE.findall(text))
        lines = [line for block in SHELL.findall(text) for line in block.splitlines()]
    else:
        lines = text.splitlines()
    for line in lines:
        code = line.split(" #")[0] if page.suffix == ".md" else line
        match = COMMAND.search(code.strip().split("        ")[0].rstrip())
        if match and "$*" not in match.group(1):  # a pattern rule of the Makefile
            yield match.group(1)


DEFAULTS = {"ld-simulate": "run"}
"""Subcommands that run where none is named."""


def complete(line: str) -> str:
    """A command line with the subcommand that it leaves out."""
    name, _, rest = line.partition(" ")
    default = f"{name} {DEFAULTS.get(name)}"
    return f"{default} {rest}" if rest.startswith("-") and default in all_commands() else line


DOCUMENTED = sorted({(line, page.name) for page in PAGES for line in command_lines(page)})


@pytest.mark.parametrize(("line", "page"), DOCUMENTED)
def test_a_documented_command_exists(line: str, page: str) -> None:
    known = all_commands()
    words = shlex.split(complete(line))
    path = words.pop(0)
    assert path in known, f"{page}: {path} is no console script"
    while words and f"{path} {words[0]}" in known:
        path = f"{path} {words.pop(0)}"
    is_group = bool(getattr(known[path], "commands", {}))
    first = words[0] if words else ""
    assert not is_group or not first or first.startswith("-"), f"{page}: {path} has no subcommand '{first}'"
    options = {name for parameter in known[path].params for name in (*parameter.opts, *parameter.secondary_opts)}
    options |= {"--help", "--version"}
    used = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert used <= options, f"{page}: {path} has no option {', '.join(sorted(used - options))}"
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).exists(), f"{page}: {word} does not exist"


def test_the_documentation_shows_every_command() -> None:
    shown = {complete(line) for line, _ in DOCUMENTED}
    commands = [path for path, command in all_commands().items() if not getattr(command, "commands", {})]
    missing = [path for path in commands if not any(line.startswith(path) for line in shown)]
    assert not missing
