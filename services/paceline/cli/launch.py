"""Runs a platform on this machine from its first process to its last.

Starts Redis, then everything else at once (services wait for each other by themselves),
writes the ready file when all are ready, keeps crashed ones coming back on the same ports,
and drains in order at the end. cli/up.py calls `run_platform` with what the user asked for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paceline.cli.child_logs import DirectorySink, LogSink, StderrSink
from paceline.cli.console import say
from paceline.cli.errors import CommandError
from paceline.cli.fleet_plan import FleetPlan, PlatformOptions, plan_fleet, with_ports
from paceline.cli.ports import require_free
from paceline.cli.readiness import ReadinessWatch, raise_if_failing
from paceline.cli.ready_file import ROLES, write_ready_file
from paceline.cli.redis import find_redis, start_redis
from paceline.cli.supervisor import Supervisor
from paceline.domain.errors import UnavailableError
from paceline.domain.member import Member
from paceline.kvstore.arena_file import arena_path
from paceline.kvstore.settings import KvNodeSettings
from paceline.process.lifecycle import Tasks
from paceline.process.membership import Membership

logger = logging.getLogger(__name__)

KILLED_EXIT_CODE = 130
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """How `paceline up` behaves around the platform."""

    ready_file: Path | None = None
    log_dir: Path | None = None
    start_timeout_s: float = 300.0


class StopSignals:
    """SIGTERM, SIGHUP and Ctrl-C ask for an orderly end; a second Ctrl-C for one at once."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.kill = asyncio.Event()

    def install(self) -> None:
        """Listen; call inside the running loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            # nohup ignores SIGHUP, and means it.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, self._note, number)

    def _note(self, number: signal.Signals) -> None:
        if self.stop.is_set() and number == signal.SIGINT:
            self.kill.set()
        self.stop.set()


async def run_platform(options: PlatformOptions, launch: LaunchOptions) -> int:
    """Run until a signal; return the exit code.

    Raises:
        CommandError: the platform cannot start; nothing is left running.
    """
    signals = StopSignals()
    signals.install()
    environ = dict(os.environ)
    executable = "" if options.redis_url else find_redis(environ.get("PATH"))
    require_free(options.host, options.grpc_port, "--grpc-port")
    require_free(options.host, options.http_port, "--http-port")
    fleet = options.fleet or f"up-{os.getpid()}-{secrets.token_hex(3)}"
    if launch.ready_file is not None:
        launch.ready_file.unlink(missing_ok=True)
    sink: LogSink = StderrSink(quiet=frozenset({"redis"}))
    if launch.log_dir is not None:
        sink = DirectorySink(launch.log_dir)
    tasks = Tasks(signals.stop)
    platform = _Platform(options, launch, fleet, tasks, sink)
    try:
        redis_url = options.redis_url or await start_redis(platform.supervisor, executable, environ)
        return await platform.run(redis_url, environ, signals)
    finally:
        platform.supervisor.kill_all()
        await tasks.close()
        sink.close()


class _Platform:
    """The processes of one `paceline up`."""

    def __init__(
        self,
        options: PlatformOptions,
        launch: LaunchOptions,
        fleet: str,
        tasks: Tasks,
        sink: LogSink,
    ) -> None:
        self._options = options
        self._launch = launch
        self._fleet = fleet
        self._redis_url = ""
        self._gateway: Member | None = None
        self.supervisor = Supervisor(tasks, sink, on_start=self._write_ready_file)

    async def run(self, redis_url: str, environ: Mapping[str, str], signals: StopSignals) -> int:
        self._redis_url = redis_url
        plan = plan_fleet(self._options, self._fleet, redis_url, environ)
        membership = Membership(redis_url, self._fleet)
        try:
            if self._options.redis_url:
                await _require_redis(membership)
            self._start(plan)
            starting = asyncio.create_task(self._become_ready(membership))
            await _first_of(starting, signals.stop)
            if starting.done():
                starting.result()
                self._announce()
                await signals.stop.wait()
            else:
                starting.cancel()
        finally:
            exit_code = await self._end(signals)
            await membership.close()
        return exit_code

    def _start(self, plan: FleetPlan) -> None:
        names = ", ".join(spec.name for spec in plan.specs)
        say(f"Starting {names} (model {self._options.model}, fleet {self._fleet})")
        for spec in plan.specs:
            self.supervisor.start(spec)

    async def _become_ready(self, membership: Membership) -> None:
        watch = ReadinessWatch(membership, self.supervisor)
        started_s = time.monotonic()
        missing: set[str] | None = None
        while missing != set():
            raise_if_failing(self.supervisor)
            now_missing = await watch.unready()
            elapsed_s = time.monotonic() - started_s
            for name in sorted((missing or set()) - now_missing):
                say(f"  {name} is ready after {elapsed_s:.1f} s")
            missing = now_missing
            if missing and elapsed_s > self._launch.start_timeout_s:
                raise CommandError(self._late(missing))
            await asyncio.sleep(_POLL_S if missing else 0)
        assert watch.gateway is not None
        self._gateway = watch.gateway
        (gateway,) = self.supervisor.of_role("gateway")
        gateway.spec = with_ports(gateway.spec, _port(self._grpc), _port(self._http))

    def _late(self, missing: set[str]) -> str:
        names = ", ".join(sorted(missing))
        lines = [f"not ready after {self._launch.start_timeout_s:g} s: {names}; last lines:"]
        for child in self.supervisor.children:
            if child.spec.name in missing:
                lines += [f"  {child.spec.name}: {line}" for line in child.last_lines[-5:]]
        return "\n".join(lines)

    @property
    def _grpc(self) -> str:
        assert self._gateway is not None
        return self._gateway.address

    @property
    def _http(self) -> str:
        assert self._gateway is not None
        return self._gateway.metrics_address

    def _announce(self) -> None:
        self._write_ready_file()
        say(f"Ready: gRPC {self._grpc}, HTTP http://{self._http}")
        say(f'Try: paceline generate "Tom has 3 apples." --endpoint {self._grpc}')

    def _write_ready_file(self) -> None:
        if self._launch.ready_file is None or self._gateway is None:
            return
        try:
            write_ready_file(
                self._launch.ready_file,
                grpc=self._grpc,
                http=self._http,
                redis=self._redis_url,
                processes=self.supervisor.pids(ROLES),
            )
        except OSError as error:
            logger.error("ready-file-failed", extra={"fields": {"error": str(error)}})

    async def _end(self, signals: StopSignals) -> int:
        """Drain, or kill when asked to; leave no file behind."""
        self._gateway = None
        if self._launch.ready_file is not None:
            self._launch.ready_file.unlink(missing_ok=True)
        say("Stopping: gateway, trainer, workers, KV store, Redis (Ctrl-C again kills at once)")
        draining = asyncio.create_task(self.supervisor.drain())
        await _first_of(draining, signals.kill)
        if not draining.done():
            self.supervisor.kill_all()
        is_orderly = await draining and not signals.kill.is_set()
        if not is_orderly:
            self._remove_arenas()
        say("Stopped" if is_orderly else "Killed")
        return 0 if is_orderly else KILLED_EXIT_CODE

    def _remove_arenas(self) -> None:
        """Remove what killed KV nodes left in shared memory; orderly ones do it themselves."""
        settings = KvNodeSettings()
        if settings.keep_arena:
            return
        for child in self.supervisor.of_role("kvstore"):
            path = arena_path(settings.arena_dir, self._fleet, child.spec.name)
            Path(path).unlink(missing_ok=True)


async def _first_of(task: asyncio.Task[object] | asyncio.Task[None], event: asyncio.Event) -> None:
    """Return when the task is done or the event is set."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


async def _require_redis(membership: Membership) -> None:
    try:
        await membership.members()
    except UnavailableError as error:
        raise CommandError(f"--redis-url: no Redis answers there ({error.message})") from error


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])
