"""docs/grafana.json uses only metrics that exist, and shows all of them."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

import pystage

DASHBOARD = Path(__file__).resolve().parent.parent / "docs/grafana.json"
TABLES = {"GAUGES": "", "COUNTERS": "_total", "OF_THE_PLUGIN": "_total"}


def exported() -> set[str]:
    """Names as Prometheus has them, from the plugin's tables of what it exports.

    They are read from the source: prometheus_client need not be installed, and decides at its
    import where figures go.
    """
    names: set[str] = set()
    for path in (Path(pystage.__file__).parent / "integrations").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                suffix = TABLES.get(node.targets[0].id.lstrip("_"))
                if suffix is not None:
                    for name, text in ast.literal_eval(node.value).items():
                        named = text[0] if isinstance(text, tuple) else name
                        names.add(f"pystage_{named}{suffix}")
    return names


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return loaded


def asked(dashboard: dict[str, Any]) -> list[str]:
    """Every query: of panels and of variables."""
    queries = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())
    ]
    return queries + [v["definition"] for v in dashboard["templating"]["list"] if "definition" in v]


def test_every_figure_that_is_shown_exists_and_every_one_is_shown(
    dashboard: dict[str, Any],
) -> None:
    shown = set(re.findall(r"\bpystage_\w+", " ".join(asked(dashboard))))
    assert len(exported()) == 24
    assert shown == exported()


def test_counters_are_rates_and_gauges_are_not(dashboard: dict[str, Any]) -> None:
    for query in asked(dashboard):
        for name in re.findall(r"\bpystage_\w+", query):
            assert (f"rate({name}{{" in query) == name.endswith("_total"), query


def test_panels_do_not_overlap_and_say_what_is_well(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken and at["x"] + at["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
