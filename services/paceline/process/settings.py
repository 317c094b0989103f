"""Settings from defaults, file, environment and flags, in rising order; unknown keys refused.

The services of one machine may share an environment, so a PACELINE_* variable that is no
setting here can be meant for another service; one that looks misspelt is refused.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import tomllib
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from paceline import __version__
from paceline.process.spans import Tracer, check_endpoint, create_tracer

ENV_PREFIX = "PACELINE_"

_TYPO_RATIO = 0.85
"""Likeness from which a name counts as a misspelling of another: one or two letters."""

_EPILOG = f"""\
Every flag is also an environment variable ({ENV_PREFIX}LOG_LEVEL for --log-level) and a key
of the file given by --config. Flags win over the environment, that over the file."""


class ServiceSettings(BaseSettings):
    """What every service has; each service adds its own fields."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    host: str = "127.0.0.1"
    """Address to bind; loopback by default, because internal ports are not authenticated."""
    redis_url: str = "redis://127.0.0.1:6379"
    """Redis of the index and the membership."""
    fleet: str = "default"
    """Name that separates fleets on one Redis."""
    member_id: str = ""
    """Name of this process in the fleet; empty derives one."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Port of /metrics; 0 takes any free one."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe level that is logged."""
    otlp_endpoint: str = ""
    """URL of an OTLP collector (gRPC, usually port 4317) that traces go to; empty sends none."""
    trace_sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the requests that are traced; callers that trace decide for theirs themselves."""

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @field_validator("otlp_endpoint")
    @classmethod
    def _reachable(cls, value: str) -> str:
        check_endpoint(value)
        return value

    @classmethod
    def load(cls, argv: list[str] | None = None) -> Self:
        """Read settings; on bad input print what is wrong and exit with status 2."""
        parser = ArgumentParser(
            prog=f"python -m {cls.__module__.rpartition('.')[0]}",
            description=cls.__doc__,
            epilog=_EPILOG,
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument("--version", action="version", version=f"paceline {__version__}")
        parser.add_argument("--config", metavar="FILE", help="TOML or JSON file", default=SUPPRESS)
        try:
            path, args = _take_config(list(sys.argv[1:] if argv is None else argv))
            values = _read_file(path) if path else {}
            _check_environment(os.environ, list(cls.model_fields))
            flags: Any = CliSettingsSource(cls, root_parser=parser, cli_parse_args=args)
            build: Any = cls
            settings: Self = build(_cli_settings_source=flags, **values)
            return settings
        except ValidationError as error:
            problems = "; ".join(_describe(item) for item in error.errors())
            parser.exit(2, f"{parser.prog}: {problems}\n")
        except (SettingsError, ValueError, OSError) as error:
            parser.exit(2, f"{parser.prog}: {error}\n")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put the file (passed as initial values) below the environment; flags come first."""
        return env_settings, init_settings

    def create_tracer(
        self, service: str, instance: str, on_dropped: Callable[[int], None]
    ) -> Tracer:
        """Return what records this process's spans, if the settings say so.

        `service` is what the process does, `instance` which one it is; `on_dropped` hears, from
        any thread, how many spans were given up.
        """
        resource = {
            "service.name": f"paceline-{service}",
            "service.namespace": self.fleet,
            "service.instance.id": instance,
            "service.version": __version__,
        }
        return create_tracer(self.otlp_endpoint, self.trace_sample_ratio, resource, on_dropped)

    def describe(self) -> dict[str, Any]:
        """Return the settings for the log, without credentials in URLs."""
        values = self.model_dump(mode="json")
        url = str(values.get("redis_url", ""))
        if "@" in url:
            values["redis_url"] = url.split("//", 1)[0] + "//***@" + url.rsplit("@", 1)[1]
        return values


def _take_config(args: list[str]) -> tuple[Path | None, list[str]]:
    """Split `--config FILE` from the other flags."""
    for i, arg in enumerate(args):
        if arg == "--config" and i + 1 < len(args):
            return Path(args[i + 1]), args[:i] + args[i + 2 :]
        if arg.startswith("--config="):
            return Path(arg.split("=", 1)[1]), args[:i] + args[i + 1 :]
    return None, args


def _read_file(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    try:
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a table of settings")
    return {key.replace("-", "_"): value for key, value in values.items()}


def _check_environment(environ: Mapping[str, str], names: list[str]) -> None:
    """Refuse variables that are almost a setting."""
    for variable in environ:
        name = variable.removeprefix(ENV_PREFIX).lower()
        if not variable.startswith(ENV_PREFIX) or name in names:
            continue
        close = difflib.get_close_matches(name, names, n=1, cutoff=_TYPO_RATIO)
        if close:
            raise ValueError(f"{variable}: no setting; {ENV_PREFIX}{close[0].upper()} is one")


def _describe(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{name}: no such setting"
    if problem["type"] == "missing":
        return f"{name}: must be set"
    return f"{name}: {problem['msg']}, not {problem['input']!r}"
