"""Writes the dashboards as JSON, or with --check tells whether they are what is written.

python -m deploy.grafana.dashboards [--check] [DIRECTORY]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.grafana.dashboards.catalog import rendered

JSON_DIRECTORY = Path(__file__).parent.parent / "json"


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=JSON_DIRECTORY)
    parser.add_argument("--check", action="store_true", help="write nothing, 1 if files differ")
    args = parser.parse_args()
    texts = rendered()
    if args.check:
        stale = _stale(args.directory, texts)
        for path in stale:
            print(f"{path}: not what `make dashboards` writes")
        return 1 if stale else 0
    args.directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (args.directory / name).write_text(text, encoding="utf-8")
    return 0


def _stale(directory: Path, texts: dict[str, str]) -> list[Path]:
    found = {path.name: path.read_text(encoding="utf-8") for path in directory.glob("*.json")}
    names = sorted({*found, *texts})
    return [directory / name for name in names if found.get(name) != texts.get(name)]


if __name__ == "__main__":
    sys.exit(main())
