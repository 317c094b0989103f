"""What all dashboards share: variables, links, marks of changes, and places on the grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.models import dashboard

from deploy.grafana.dashboards.panels import BLUE, DATASOURCE, GREEN, ORANGE, Panel
from deploy.grafana.dashboards.queries import FLEET

TAG = "paceline"
"""Dashboards with this tag link to each other."""

_GRID_WIDTH = 24
_ALL = dashboard.VariableOption(selected=True, text=["All"], value=["$__all"])


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one headline, from left to right, in as many lines as they need."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice of one dashboard only: one of some values that are written into its queries."""

    name: str
    label: str
    description: str
    values: Sequence[str]
    default: str


@dataclass(frozen=True, slots=True)
class Choice:
    """A choice among the values that a label has; several may be chosen."""

    name: str
    label: str
    values_of: str
    """Label whose values are offered."""
    source: str
    """Series that are looked at."""


def board(
    uid: str,
    title: str,
    description: str,
    rows: Iterable[Row],
    *,
    variables: Iterable[Variable | Choice] = (),
) -> dashboard.Dashboard:
    """Return a dashboard; `uid` is part of its address and must never change."""
    builder = (
        build.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG, "generated"])
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .link(_other_dashboards())
    )
    builder = builder.with_variable(_datasource())
    for each in (*_CHOICES, *variables):
        builder = builder.with_variable(
            _choice(each) if isinstance(each, Choice) else _custom(each)
        )
    made = builder.build()
    made.panels, made.annotations = _placed(rows), _changes()
    return made


_INFO = "paceline_build_info"
_CHOICES = (
    Choice("fleet", "Fleet", "fleet", _INFO),
    Choice("model", "Model", "model", f'{_INFO}{{fleet=~"$fleet"}}'),
    Choice("role", "Role", "role", FLEET.series(_INFO)),
    Choice("member", "Member", "member", FLEET.series(_INFO, 'role=~"$role"')),
)
"""Each narrows what the next one offers."""


def _datasource() -> build.DatasourceVariable:
    return (
        build.DatasourceVariable("datasource")
        .label("Data source")
        .description("The Prometheus that scrapes the fleet.")
        .type("prometheus")
        .multi(False)
    )


def _choice(choice: Choice) -> build.QueryVariable:
    query = f"label_values({choice.source}, {choice.values_of})"
    return (
        build.QueryVariable(choice.name)
        .label(choice.label)
        .description(f"Values of the label {choice.values_of}; several may be chosen.")
        .datasource(DATASOURCE)
        .query({"query": query, "refId": choice.name})
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        # Of processes with the label only: others that the server scrapes are not ours.
        .all_value(".+")
        .current(_ALL)
    )


def _custom(variable: Variable) -> build.CustomVariable:
    default = variable.default
    return (
        build.CustomVariable(variable.name)
        .label(variable.label)
        .description(variable.description)
        .values(",".join(variable.values))
        .options(
            [
                dashboard.VariableOption(selected=value == default, text=value, value=value)
                for value in variable.values
            ]
        )
        .current(dashboard.VariableOption(selected=True, text=default, value=default))
        .multi(False)
        .include_all(False)
    )


def _other_dashboards() -> build.DashboardLink:
    return (
        build.DashboardLink("Paceline")
        .type(dashboard.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .tooltip("The other dashboards, same time and choices")
        .include_vars(True)
        .keep_time(True)
    )


_MARK_STEP_S = 60
"""How far apart marks are looked for."""


class _Mark(dashboard.AnnotationQuery):
    """A vertical line wherever a query has values, with a text the SDK's type has no field for."""

    def __init__(self, name: str, expr: str, text: str, color: str) -> None:
        super().__init__(name=name, datasource=DATASOURCE, expr=expr, icon_color=color)
        self._text = text

    def to_json(self) -> dict[str, object]:
        texts = {"titleFormat": self.name, "textFormat": self._text}
        return {**super().to_json(), **texts, "step": f"{_MARK_STEP_S}s"}


def _changes() -> dashboard.AnnotationContainer:
    """Return marks for what changes by itself: processes, drafts, sizes."""
    started = FLEET.series("process_start_time_seconds")
    drafts = FLEET.series("paceline_trainer_plan_number")
    sizes = FLEET.series("paceline_autoscaler_requested_replicas")
    step = f"{_MARK_STEP_S}s"
    return dashboard.AnnotationContainer(
        [
            _Mark(
                "Process started",
                f"time() - {started} < {_MARK_STEP_S}",
                "{{role}} {{member}}",
                BLUE,
            ),
            _Mark(
                "Draft changed",
                f"max(changes({drafts}[{step}])) > 0",
                "The trainer changed which versions are drafted with",
                ORANGE,
            ),
            _Mark(
                "Scaled",
                f"sum by (pool) (changes({sizes}[{step}])) > 0",
                "{{pool}}: another number of workers was asked for",
                GREEN,
            ),
        ]
    )


def _placed(rows: Iterable[Row]) -> list[dashboard.Panel | dashboard.RowPanel]:
    """Return headlines and panels with their places and numbers."""
    placed: list[dashboard.Panel | dashboard.RowPanel] = []
    top = 0
    for row in rows:
        head = build.Row(row.title).build()
        head.grid_pos = dashboard.GridPos(h=1, w=_GRID_WIDTH, x=0, y=top)
        placed.append(head)
        top, left, line_height = top + 1, 0, 0
        for panel in (each.build() for each in row.panels):
            place = panel.grid_pos
            assert place is not None, f"{panel.title} has no size"
            if left + place.w > _GRID_WIDTH:
                top, left, line_height = top + line_height, 0, 0
            place.x, place.y = left, top
            left, line_height = left + place.w, max(line_height, place.h)
            placed.append(panel)
        top += line_height
    for number, each in enumerate(placed, start=1):
        each.id_val = number
    return placed
