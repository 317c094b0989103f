"""All dashboards, by file name."""

from __future__ import annotations

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.dashboards.autoscaler import autoscaler
from deploy.grafana.dashboards.kv_routing import kv_routing
from deploy.grafana.dashboards.overview import overview
from deploy.grafana.dashboards.runtime import runtime
from deploy.grafana.dashboards.speculation import speculation

DASHBOARDS = (overview, kv_routing, speculation, autoscaler, runtime)


def rendered() -> dict[str, str]:
    """Return the JSON of every dashboard by file name."""
    encoder = JSONEncoder(sort_keys=True, indent=2)
    made = [make() for make in DASHBOARDS]
    # Without an id of its own Grafana finds a dashboard by its uid, whichever instance it is.
    return {
        f"{each.uid}.json": encoder.encode({**each.to_json(), "id": None}) + "\n" for each in made
    }
