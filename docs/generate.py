"""Write the generated parts of the documentation: `docs/reference/` and the tables between markers.

python docs/generate.py            write them
python docs/generate.py --check    exit with 1 if one is not current
"""

from __future__ import annotations

import sys

from generators import ROOT, api, commands, configuration, results


def generated() -> dict[str, str]:
    """Each generated file's content by its path, relative to the repository."""
    pages = {
        "docs/reference/configuration.md": configuration.page(),
        "docs/reference/commands.md": commands.page(),
        "docs/reference/api.md": api.page(),
    }
    tables = results.tables()
    for name in ("README.md", "docs/aggregation.md", "docs/results.md", "docs/method.md"):
        pages[name] = results.fill((ROOT / name).read_text(encoding="utf-8"), tables, name)
    return pages


def main() -> int:
    """Write or check; returns the exit code."""
    stale = []
    for name, text in generated().items():
        path = ROOT / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    action = "not current, run `make docs`:" if "--check" in sys.argv else "wrote"
    print(f"{action} {', '.join(stale)}" if stale else "every generated page is current")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
