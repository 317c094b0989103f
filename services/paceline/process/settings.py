"""Settings from defaults, file, environment and flags, in rising order; unknown keys refused."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)


class ServiceSettings(BaseSettings):
    """What every service has; each service adds its own fields."""

    model_config = SettingsConfigDict(
        env_prefix="PACELINE_",
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
    metrics_port: int = 0
    """Port of /metrics; 0 takes any free one."""
    log_level: str = "INFO"
    """Least severe level that is logged."""

    @classmethod
    def load(cls, argv: list[str] | None = None) -> Self:
        """Read settings; on bad input print what is wrong and exit with status 2."""
        args = list(sys.argv[1:] if argv is None else argv)
        try:
            path, args = _take_config(args)
            file_values = _read_file(path) if path else {}
            flags: Any = CliSettingsSource(cls, cli_parse_args=args)
            return cls(_cli_settings_source=flags, **file_values)
        except (ValidationError, SettingsError, ValueError, OSError) as error:
            print(f"{cls.__name__}: {error}", file=sys.stderr)
            raise SystemExit(2) from error

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
    values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a table of settings")
    return {key.replace("-", "_"): value for key, value in values.items()}
