"""Serves the metrics of a process that has no HTTP port of its own."""

from __future__ import annotations

from prometheus_client import start_http_server

from paceline.process.metrics.book import Metrics


class MetricsServer:
    """A /metrics endpoint on its own thread."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        try:
            self._server, self._thread = start_http_server(port, host, metrics.registry)
        except OSError as error:
            text = error.strerror or str(error)
            raise OSError(f"cannot serve metrics on {host}:{port}: {text}") from error
        self.port = int(self._server.server_port)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(metrics: Metrics, host: str, port: int) -> MetricsServer:
    """Serve /metrics at host:port; port 0 takes any free one, see `.port`.

    Raises:
        OSError: the address cannot be bound; the message says why.
    """
    return MetricsServer(metrics, host, port)
