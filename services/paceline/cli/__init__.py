"""The `paceline` command: start the platform, talk to it, watch it. No torch."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line; exits the process."""
    # Imported here, so that tools that only look at the package stay fast.
    from paceline.cli.app import app

    app()
