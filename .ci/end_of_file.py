"""Give each named text file exactly one newline at its end; exits with 1 if one was changed."""

from __future__ import annotations

import sys
from pathlib import Path


def main(names: list[str]) -> int:
    """Mend the files; returns the exit code."""
    changed = []
    for path in map(Path, names):
        content = path.read_bytes()
        mended = content.rstrip(b"\r\n") + b"\n" if content.strip() else b""
        if mended != content:
            path.write_bytes(mended)
            changed.append(str(path))
    if changed:
        print(f"mended the end of {', '.join(changed)}")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
