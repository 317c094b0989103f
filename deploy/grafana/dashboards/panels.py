"""The kinds of panels: curves, quantiles, rates, one number, a table, states, a heatmap.

Each function returns a builder of the SDK with what all panels need: title, description, unit,
data source, size. A description says what is shown, what is usual and where to look next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import TypeVar

from grafana_foundation_sdk.builders import (
    common,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.grafana.dashboards.queries import CHOSEN, Query, Scope

DATASOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
"""Every panel and query asks the source that the variable names."""

GREEN, ORANGE, RED, BLUE, GREY = "green", "orange", "red", "blue", "#808080"

Steps = Sequence[tuple[float, str]]
"""From which value on which colour; below the first it is green."""

Panel = timeseries.Panel | stat.Panel | table.Panel | statetimeline.Panel | heatmap.Panel
_P = TypeVar("_P", timeseries.Panel, stat.Panel, table.Panel, statetimeline.Panel, heatmap.Panel)

_HEIGHT = 8
_NUMBER_HEIGHT = 4
_TABLE_LEGEND_FROM = 3
"""Queries from which on a legend is a table with numbers."""


def curves(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 8,
    steps: Steps = (),
    colors: Mapping[str, str] | None = None,
    target: str = "",
    is_stacked: bool = False,
    is_stepped: bool = False,
    max_value: float | None = None,
) -> timeseries.Panel:
    """Return values over time.

    `steps` are drawn as dashed lines, `colors` fixes those of series by name, the series called
    `target` is drawn as what others are measured against.
    """
    panel = _common(timeseries.Panel(), title, description, unit, width, _HEIGHT, queries)
    panel = panel.min(0).line_width(1).fill_opacity(60 if is_stacked else 8)
    panel = panel.show_points(kinds.VisibilityMode.NEVER).legend(_legend(queries))
    panel = panel.tooltip(
        common.VizTooltipOptions()
        .mode(kinds.TooltipDisplayMode.MULTI)
        .sort(kinds.SortOrder.DESCENDING)
    )
    if max_value is not None:
        panel = panel.max(max_value)
    if is_stacked:
        panel = panel.stacking(common.StackingConfig().mode(kinds.StackingMode.NORMAL))
    if is_stepped:
        panel = panel.line_interpolation(kinds.LineInterpolation.STEP_AFTER)
    if steps:
        dashed = common.GraphThresholdsStyleConfig().mode(kinds.GraphTresholdsStyleMode.DASHED)
        panel = panel.thresholds(_thresholds(steps)).thresholds_style(dashed)
    for name, color in (colors or {}).items():
        panel = panel.override_by_name(name, [_color(color)])
    if target:
        dash = dashboard.DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [8, 8]})
        bare = dashboard.DynamicConfigValue("custom.fillOpacity", 0)
        panel = panel.override_by_name(target, [_color(RED), dash, bare])
    return panel


def quantiles(
    title: str,
    description: str,
    histogram: str,
    *more: Query,
    scope: Scope,
    matchers: Sequence[str] = (),
    by: str = "",
    unit: str = "s",
    width: int = 8,
    target: str = "",
) -> timeseries.Panel:
    """Return p50, p95 and p99 of a histogram over time, or only p95 for each value of a label."""
    if by:
        queries = [Query(scope.quantile(0.95, histogram, *matchers, by=by), _names(by))]
    else:
        queries = [
            Query(scope.quantile(share, histogram, *matchers), f"p{share * 100:.0f}")
            for share in (0.5, 0.95, 0.99)
        ]
    return curves(title, description, unit, *queries, *more, width=width, target=target)


def rates(
    title: str,
    description: str,
    unit: str,
    counters: Mapping[str, str],
    *,
    scope: Scope,
    by: str = "",
    width: int = 8,
    is_stacked: bool = False,
    colors: Mapping[str, str] | None = None,
) -> timeseries.Panel:
    """Return how fast counters grow; `counters` is what they are called, then their name."""
    queries = [
        Query(scope.rate(metric, by=by), f"{_names(by)} {name}".strip() if by else name)
        for name, metric in counters.items()
    ]
    return curves(
        title, description, unit, *queries, width=width, is_stacked=is_stacked, colors=colors
    )


def number(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 3,
    steps: Steps = (),
    base: str = GREEN,
    decimals: int | None = None,
    words: Mapping[str, tuple[str, str]] | None = None,
    shows_name: bool = False,
) -> stat.Panel:
    """Return the latest value, large, on a background that tells whether it is as it should be.

    Without `steps` and `words` the value has no judgement and no background. `words` shows text
    and colour in place of values.
    """
    panel = _common(stat.Panel(), title, description, unit, width, _NUMBER_HEIGHT, queries)
    is_judged = bool(steps or words)
    background, plain = kinds.BigValueColorMode.BACKGROUND, kinds.BigValueColorMode.NONE
    name, auto = kinds.BigValueTextMode.VALUE_AND_NAME, kinds.BigValueTextMode.AUTO
    panel = (
        panel.color_mode(background if is_judged else plain)
        .graph_mode(kinds.BigValueGraphMode.NONE if words else kinds.BigValueGraphMode.AREA)
        .text_mode(name if shows_name else auto)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(_thresholds(steps, base))
        .no_value("-")
    )
    if decimals is not None:
        panel = panel.decimals(decimals)
    return panel.mappings([_mapping(words)]) if words else panel


def rows(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    columns: Mapping[str, str],
    units: Mapping[str, str] | None = None,
    width: int = 12,
    height: int = _HEIGHT,
    sort_by: str = "",
) -> table.Panel:
    """Return a table of the present; `columns` are fields in order and how they are headed.

    The value of a table's only query is the field `Value`, that of one of several
    `Value #A`, `Value #B`. Fields that `columns` lacks are left out.
    """
    panel = _common(table.Panel(), title, description, unit, width, height, queries, as_rows=True)
    panel = panel.show_header(True)
    if len(queries) > 1:
        panel = panel.with_transformation(dashboard.DataTransformerConfig("merge", options={}))
    kept = {"include": {"names": list(columns)}}
    order = {
        "indexByName": {field: place for place, field in enumerate(columns)},
        "renameByName": dict(columns),
    }
    panel = panel.with_transformation(
        dashboard.DataTransformerConfig("filterFieldsByName", options=kept)
    ).with_transformation(dashboard.DataTransformerConfig("organize", options=order))
    for name, column_unit in (units or {}).items():
        value = dashboard.DynamicConfigValue("unit", column_unit)
        panel = panel.override_by_name(name, [value])
    if sort_by:
        panel = panel.sort_by([common.TableSortByFieldState().display_name(sort_by).desc(True)])
    return panel


def states(
    title: str,
    description: str,
    *queries: Query,
    words: Mapping[str, tuple[str, str]],
    width: int = 12,
) -> statetimeline.Panel:
    """Return which state something was in when; `words` are text and colour by value."""
    panel = _common(statetimeline.Panel(), title, description, "none", width, _HEIGHT, queries)
    return (
        panel.mappings([_mapping(words)])
        .show_value(kinds.VisibilityMode.NEVER)
        .merge_values(True)
        .legend(_legend(()))
    )


def up_states(
    title: str, description: str, metrics: Mapping[str, str], width: int = 12
) -> statetimeline.Panel:
    """Return when links of processes were up: metrics that are 1 or 0, by what they are called."""
    queries = [
        Query(CHOSEN.min(metric, by="member"), f"{{{{member}}}} {name}".strip())
        for name, metric in metrics.items()
    ]
    words = {"1": ("up", GREEN), "0": ("down", RED)}
    return states(title, description, *queries, words=words, width=width)


def spread(
    title: str, description: str, histogram: str, *, scope: Scope, width: int = 12
) -> heatmap.Panel:
    """Return how the values of a histogram were distributed over time."""
    query = Query(scope.buckets(histogram), "{{le}}")
    panel = _common(
        heatmap.Panel(), title, description, "s", width, _HEIGHT, [query], is_heatmap=True
    )
    color = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges")
    color = color.fill("dark-orange").exponent(0.5).steps(64)
    return (
        panel.calculate(False)
        .color(color)
        .y_axis(heatmap.YAxisConfig().unit("s"))
        .show_legend()
        .show_tooltip()
    )


def _common(
    panel: _P,
    title: str,
    description: str,
    unit: str,
    width: int,
    height: int,
    queries: Sequence[Query],
    *,
    as_rows: bool = False,
    is_heatmap: bool = False,
) -> _P:
    panel = panel.title(title).description(description).unit(unit).datasource(DATASOURCE)
    panel = panel.span(width).height(height)
    for ref_id, query in zip(ascii_uppercase, queries, strict=False):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend)
        target = target.ref_id(ref_id).datasource(DATASOURCE)
        if as_rows:
            target = target.instant().format(PromQueryFormat.TABLE)
        else:
            form = PromQueryFormat.HEATMAP if is_heatmap else PromQueryFormat.TIME_SERIES
            target = target.range().format(form)
        panel = panel.with_target(target)
    return panel


def _legend(queries: Sequence[Query]) -> common.VizLegendOptions:
    """Return numbers beside the names where there are many series, else the names only."""
    is_many = len(queries) >= _TABLE_LEGEND_FROM or any("{{" in query.legend for query in queries)
    mode = kinds.LegendDisplayMode.TABLE if is_many else kinds.LegendDisplayMode.LIST
    return (
        common.VizLegendOptions()
        .display_mode(mode)
        .placement(kinds.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull", "max"] if is_many else [])
    )


def _thresholds(steps: Steps, base: str = GREEN) -> build.ThresholdsConfig:
    colored = [dashboard.Threshold(value, color) for value, color in steps]
    return (
        build.ThresholdsConfig()
        .mode(dashboard.ThresholdsMode.ABSOLUTE)
        .steps([dashboard.Threshold(None, base), *colored])
    )


def _mapping(words: Mapping[str, tuple[str, str]]) -> dashboard.ValueMap:
    return dashboard.ValueMap(
        {
            value: dashboard.ValueMappingResult(text=text, color=color)
            for value, (text, color) in words.items()
        }
    )


def _color(color: str) -> dashboard.DynamicConfigValue:
    return dashboard.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": color})


def _names(by: str) -> str:
    return " ".join(f"{{{{{label.strip()}}}}}" for label in by.split(","))
