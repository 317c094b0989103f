"""Every metric of the platform: declared once by area, made per process, served over HTTP."""

from paceline.process.metrics.book import Metrics
from paceline.process.metrics.recent import RecentVersions
from paceline.process.metrics.server import MetricsServer, serve_metrics

__all__ = ["Metrics", "MetricsServer", "RecentVersions", "serve_metrics"]
