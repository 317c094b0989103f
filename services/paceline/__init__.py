"""Paceline: LLM serving that gets faster the more it is used."""

from importlib.metadata import version

__version__ = version("paceline")
