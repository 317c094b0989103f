"""Runs a platform on this machine from its first process to its last.

Starts Redis, then everything else at once (services wait for each other by themselves), and
what watches the platform once the gateway's address is known: Prometheus, the autoscaler. Writes
the ready file when all are ready, keeps crashed ones coming back on the same ports, lets pools
be scaled (pools.py), and drains in order at the end. cli/up.py calls `run_platform` with what the
user asked for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from paceline.cli.child_logs import DirectorySink, LogSink, StderrSink
from paceline.cli.console import say
from paceline.cli.errors import CommandError
from paceline.cli.fleet_control import serve_control
from paceline.cli.fleet_plan import FleetPlan, FleetPlanner, with_ports
from paceline.cli.platform_options import PlatformOptions
from paceline.cli.pools import WorkerPools
from paceline.cli.ports import require_free
from paceline.cli.prometheus import find_prometheus, start_prometheus
from paceline.cli.readiness import ReadinessWatch, raise_if_failing
from paceline.cli.ready_file import ROLES, write_ready_file
from paceline.cli.redis import find_redis, start_redis
from paceline.cli.stop_signals import StopSignals
from paceline.cli.supervisor import Supervisor
from paceline.domain.errors import UnavailableError
from paceline.domain.member import Member
from paceline.kvstore.arena_file import arena_path
from paceline.kvstore.settings import KvNodeSettings
from paceline.process.lifecycle import Tasks
from paceline.process.membership import Membership

logger = logging.getLogger(__name__)

StartWatching = Callable[[str, str], Awaitable[str]]
"""Starts Prometheus and the autoscaler, as far as wanted: addresses of the gateway's HTTP and of
the pools' control in, the URL of Prometheus out; empty without one."""

KILLED_EXIT_CODE = 130
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """How `paceline up` behaves around the platform."""

    ready_file: Path | None = None
    log_dir: Path | None = None
    start_timeout_s: float = 300.0


async def run_platform(options: PlatformOptions, launch: LaunchOptions) -> int:
    """Run until a signal; return the exit code.

    Raises:
        CommandError: the platform cannot start; nothing is left running.
    """
    signals = StopSignals()
    signals.install()
    environ = dict(os.environ)
    path = environ.get("PATH")
    executable = "" if options.redis_url else find_redis(path)
    prometheus = find_prometheus(path) if options.starts_prometheus else ""
    require_free(options.host, options.grpc_port, "--grpc-port")
    require_free(options.host, options.http_port, "--http-port")
    fleet = options.fleet or f"up-{os.getpid()}-{secrets.token_hex(3)}"
    if launch.ready_file is not None:
        launch.ready_file.unlink(missing_ok=True)
    sink: LogSink = StderrSink(quiet=frozenset({"redis", "prometheus"}))
    if launch.log_dir is not None:
        sink = DirectorySink(launch.log_dir)
    tasks = Tasks(signals.stop)
    platform = _Platform(options, launch, fleet, tasks, sink)
    supervisor, files = platform.supervisor, ExitStack()
    try:
        redis_url = options.redis_url or await start_redis(supervisor, executable, environ)
        planner = FleetPlanner(options, fleet, redis_url, environ)

        async def watch(gateway_http: str, control: str) -> str:
            url = options.prometheus_url or ""
            if prometheus:
                directory = files.enter_context(_temporary_directory())
                url = await start_prometheus(
                    supervisor, prometheus, gateway_http, directory, environ
                )
            if options.autoscale is not None:
                supervisor.start(planner.autoscaler(control, url))
            return url

        return await platform.run(planner, redis_url, watch, signals)
    finally:
        supervisor.kill_all()
        await tasks.close()
        sink.close()
        files.close()


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
        self._addresses: dict[str, str] = {}
        """What the ready file says, beside processes."""
        self._is_ready = False
        self.supervisor = Supervisor(tasks, sink, on_change=self._write_ready_file)

    async def run(
        self, planner: FleetPlanner, redis_url: str, watch: StartWatching, signals: StopSignals
    ) -> int:
        membership = Membership(redis_url, self._fleet)
        control = await serve_control(
            WorkerPools(self.supervisor, planner.worker, self._options.worker_limit)
        )
        self._addresses |= {"redis": redis_url, "control": control.address}
        try:
            if self._options.redis_url:
                await _require_redis(membership)
            self._start(planner.plan())
            starting = asyncio.create_task(self._become_ready(membership, watch))
            await _first_of(starting, signals.stop)
            if starting.done():
                starting.result()
                self._announce()
                await signals.stop.wait()
            else:
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
        finally:
            # First, so that nobody starts workers while all end.
            await control.drain(0.0)
            exit_code = await self._end(signals)
            await membership.close()
        return exit_code

    def _start(self, plan: FleetPlan) -> None:
        names = ", ".join(spec.name for spec in plan.specs)
        say(f"Starting {names} (model {self._options.model}, fleet {self._fleet})")
        for spec in plan.specs:
            self.supervisor.start(spec)

    async def _become_ready(self, membership: Membership, watch: StartWatching) -> None:
        readiness = ReadinessWatch(membership, self.supervisor)
        started_s = time.monotonic()
        missing: set[str] | None = None
        while missing != set() or "http" not in self._addresses:
            raise_if_failing(self.supervisor)
            if readiness.gateway is not None and "http" not in self._addresses:
                await self._note_gateway(readiness.gateway, watch)
            now_missing = await readiness.unready()
            elapsed_s = time.monotonic() - started_s
            for name in sorted((missing or set()) - now_missing):
                say(f"  {name} is ready after {elapsed_s:.1f} s")
            missing = now_missing
            if missing and elapsed_s > self._launch.start_timeout_s:
                raise CommandError(self._late(missing))
            await asyncio.sleep(_POLL_S if missing else 0)

    async def _note_gateway(self, member: Member, watch: StartWatching) -> None:
        """Keep the gateway's addresses, from now on for all its starts, and watch it."""
        grpc, http = member.address, member.metrics_address
        self._addresses |= {"grpc": grpc, "http": http}
        (gateway,) = self.supervisor.of_role("gateway")
        gateway.spec = with_ports(gateway.spec, _port(grpc), _port(http))
        self._addresses["prometheus"] = await watch(http, self._addresses["control"])

    def _late(self, missing: set[str]) -> str:
        names = ", ".join(sorted(missing))
        lines = [f"not ready after {self._launch.start_timeout_s:g} s: {names}; last lines:"]
        for child in self.supervisor.children:
            if child.spec.name in missing:
                lines += [f"  {child.spec.name}: {line}" for line in child.last_lines[-5:]]
        return "\n".join(lines)

    def _announce(self) -> None:
        self._is_ready = True
        self._write_ready_file()
        grpc, prometheus = self._addresses["grpc"], self._addresses["prometheus"]
        watched = f", Prometheus {_without_credentials(prometheus)}" if prometheus else ""
        say(f"Ready: gRPC {grpc}, HTTP http://{self._addresses['http']}{watched}")
        say(f'Try: paceline generate "Tom has 3 apples." --endpoint {grpc}')

    def _write_ready_file(self) -> None:
        if self._launch.ready_file is None or not self._is_ready:
            return
        processes = self.supervisor.pids(ROLES)
        try:
            write_ready_file(self._launch.ready_file, self._addresses, processes)
        except OSError as error:
            logger.error("ready-file-failed", extra={"fields": {"error": str(error)}})

    async def _end(self, signals: StopSignals) -> int:
        """Drain, or kill when asked to; leave no file behind."""
        self._is_ready = False
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


def _without_credentials(url: str) -> str:
    scheme, _, rest = url.partition("//")
    return f"{scheme}//{rest.rpartition('@')[2]}"


@contextmanager
def _temporary_directory() -> Iterator[Path]:
    """Lend a directory that is removed with all that is in it."""
    with tempfile.TemporaryDirectory(prefix="paceline-", ignore_cleanup_errors=True) as name:
        yield Path(name)
