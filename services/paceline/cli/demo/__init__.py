"""`paceline demo`: starts a platform and shows that its promises hold, in two minutes or so.

command.py is the page to read first; prompts.py holds what is asked.
"""

from __future__ import annotations

from paceline.cli.demo.command import demo

__all__ = ["demo"]
