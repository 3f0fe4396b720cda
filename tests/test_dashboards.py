"""configs/grafana and configs/prometheus: well formed, and about metrics and labels that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import fakeredis
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from lamella.keys import Keys
from lamella.messages import EngineProcessInfo, ModelInfo, WorkerInfo
from lamella_engine.sequence_types import EngineCounters, PlanFacts
from lamella_worker.engine_sources import EngineSources
from lamella_worker.metrics_cli import DEFAULT_PORT
from lamella_worker.metrics_engine import EngineCollector
from lamella_worker.metrics_fleet import FleetCollector, FleetReader
from lamella_worker.metrics_jobs import JobMetrics
from tests.scrape import Scrape

promql_parser = pytest.importorskip("promql_parser", reason="the extra [dev] is not installed")

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
BOARD = json.loads((CONFIGS / "grafana" / "lamella.json").read_text())
RULES = yaml.safe_load((CONFIGS / "prometheus" / "lamella.rules.yml").read_text())
SCRAPES = yaml.safe_load((CONFIGS / "prometheus" / "prometheus.yml").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
RULE_LIST = [rule for group in RULES["groups"] for rule in group["rules"]]
OF_PROMETHEUS = {"up": {"job", "instance"}}
ADDED_BY_SCRAPES = {"job", "instance"}
MODEL = "tiny"


@pytest.fixture(scope="module")
def told() -> Mapping[str, set[str]]:
    """Every sample that a scrape of a worker and of the fleet has, with its labels."""
    registry = CollectorRegistry()
    metrics = JobMetrics(registry, MODEL)
    metrics.swept(MODEL, (0.1,), 1)
    plan = PlanFacts(0, 0, 4, 0, 0, 100, 64, 100, 16, None, 100, 0.1, True)
    counters = EngineCounters(
        running=0, waiting=0, sweeps=0, tokens=0, streamed_bytes=0, peak_rss_bytes=0, last_sweep_at=None
    )
    info = worker_info()
    registry.register(EngineCollector(EngineSources(lambda: info, lambda model: counters, lambda model: plan)))
    client = fakeredis.FakeRedis(protocol=2, decode_responses=True)
    keys = Keys("t:")
    client.set(keys.worker("w"), info.model_dump_json())
    client.zadd(keys.workers, {"w": 1})
    registry.register(FleetCollector(FleetReader(client, keys).read))
    samples = Scrape(generate_latest(registry).decode()).samples
    client.close()
    labels: dict[str, set[str]] = {}
    for sample in samples:
        if sample.name.endswith("_created"):
            continue  # the server leaves them out
        labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def worker_info() -> WorkerInfo:
    model = ModelInfo(name=MODEL, family="llama", dtype="float32", num_layers=4, context_length=64, size_bytes=100)
    process = EngineProcessInfo(pid=1, state="ready", restarts=0, max_sequences=4, trouble=None)
    return WorkerInfo(
        name="w", host="h", pid=1, version="1", device="cpu", model=model, slots=4, running=0, draining=False,
        started_at=1.0, heartbeat_at=1.0, last_sweep_at=None, sweeps=0, tokens=0, streamed_bytes=0, peak_rss_bytes=0,
        engine_process=process,
    )  # fmt: skip


def expressions() -> Iterator[tuple[str, str]]:
    """Every PromQL expression, with where it is; Grafana's variables are filled in as Grafana does."""
    for panel in PANELS:
        for target in panel["targets"]:
            filled = target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*")
            yield f"{panel['title']}/{target['refId']}", filled
    for rule in RULE_LIST:
        yield rule.get("alert") or rule["record"], rule["expr"]


EXPRESSIONS = dict(expressions())


def selectors(expression: str) -> list[tuple[str, set[str]]]:
    """Names of metrics that an expression selects, each with the labels that it matches."""
    found: list[tuple[str, set[str]]] = []

    def visit(node: object) -> None:
        selector = node.vector_selector if isinstance(node, promql_parser.MatrixSelector) else node
        if isinstance(selector, promql_parser.VectorSelector):
            found.append((selector.name, {matcher.name for matcher in selector.matchers.matchers}))

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def test_there_is_a_panel_or_rule_for_everything_that_can_be_wrong() -> None:
    assert len(EXPRESSIONS) > 40
    assert {rule["alert"] for rule in RULE_LIST if "alert" in rule} >= {"LamellaNoWorker", "LamellaDeadJobs"}


@pytest.mark.parametrize("place", EXPRESSIONS)
def test_expressions_are_promql_about_metrics_and_labels_that_exist(place: str, told: Mapping[str, set[str]]) -> None:
    recorded = {rule["record"]: {"model", *ADDED_BY_SCRAPES} for rule in RULE_LIST if "record" in rule}
    known = {**told, **recorded, **OF_PROMETHEUS}

    used = selectors(EXPRESSIONS[place])

    assert used
    for name, labels in used:
        assert name in known, f"{place} asks for {name}, which nobody tells"
        assert labels <= known[name] | ADDED_BY_SCRAPES, f"{place} matches labels of {name} that it does not have"


@pytest.mark.parametrize("place", EXPRESSIONS)
def test_expressions_group_by_labels_that_exist(place: str, told: Mapping[str, set[str]]) -> None:
    grouped = set(re.findall(r"\w+", " ".join(re.findall(r"\b(?:by|on|without) \(([^)]*)\)", EXPRESSIONS[place]))))

    available = set().union(*(told.get(name, {"model"}) for name, _ in selectors(EXPRESSIONS[place])))

    assert grouped <= available | ADDED_BY_SCRAPES


@pytest.mark.parametrize("place", EXPRESSIONS)
def test_counters_are_read_as_rates_and_gauges_are_not(place: str, told: Mapping[str, set[str]]) -> None:
    expression = EXPRESSIONS[place]

    for name, _ in selectors(expression):
        is_counter = name.endswith(("_total", "_bucket", "_sum", "_count"))
        is_rated = re.search(rf"\b(rate|increase)\({re.escape(name)}\b", expression) is not None
        assert is_counter == is_rated, f"{place} reads {name}"


def test_every_metric_of_ours_has_a_unit_or_is_a_count_and_is_explained(told: Mapping[str, set[str]]) -> None:
    units = ("_seconds", "_bytes", "_total", "_info", "_sequences", "_jobs", "_blocks", "_blocks_used", "_layers")
    states = {"lamella_engine_ready", "lamella_draining", "lamella_redis_up"}
    counts = {"lamella_workers", "lamella_worker_slots", "lamella_busy_slots"}
    page = (CONFIGS.parent / "docs" / "observability.md").read_text()

    for name in told:
        family = re.sub(r"_(bucket|count|sum)$", "", name)
        if family.startswith("lamella_"):
            assert family.endswith(units) or family in states | counts, family
            assert f"`{family}`" in page, f"docs/observability.md does not explain {family}"


def test_the_page_explains_no_metric_that_is_not_told(told: Mapping[str, set[str]]) -> None:
    page = (CONFIGS.parent / "docs" / "observability.md").read_text()
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in told}

    assert set(re.findall(r"`(lamella_[a-z_]+)`", page)) <= families


def test_panels_do_not_overlap_and_have_numbers_of_their_own() -> None:
    cells = [
        (x, y)
        for panel in BOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]

    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(ids) == len(set(ids))
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in PANELS)


def test_alerts_say_what_how_bad_and_what_to_do() -> None:
    alerts = [rule for rule in RULE_LIST if "alert" in rule]

    assert len({rule["alert"] for rule in alerts}) == len(alerts)
    for rule in alerts:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        for used in re.findall(r"\$labels\.(\w+)", str(rule["annotations"])):
            assert used in ("model", "instance")
        assert promql_parser.parse_duration(rule.get("for", "1m")).total_seconds() > 0


def test_rule_files_and_targets_of_the_scrape_config_are_there() -> None:
    assert [CONFIGS / "prometheus" / name for name in SCRAPES["rule_files"]] == [
        CONFIGS / "prometheus" / "lamella.rules.yml"
    ]
    jobs = {job["job_name"]: job for job in SCRAPES["scrape_configs"]}
    assert jobs["lamella"]["static_configs"][0]["targets"] == [f"127.0.0.1:{DEFAULT_PORT}"]
    assert jobs["lamella-workers"]["http_sd_configs"][0]["url"] == f"http://127.0.0.1:{DEFAULT_PORT}/targets"
    # tests/test_compose.py reads the others.
    of_compose = {"compose.yml", "provisioning"}
    assert {path.name for path in (CONFIGS / "prometheus").iterdir()} - of_compose == {
        "prometheus.yml", "lamella.rules.yml"
    }  # fmt: skip
    assert {path.name for path in (CONFIGS / "grafana").iterdir()} - of_compose == {"lamella.json"}


def test_a_server_that_does_not_answer_is_told_and_nothing_else() -> None:
    away = fakeredis.FakeServer()
    away.connected = False
    registry = CollectorRegistry()

    registry.register(FleetCollector(FleetReader(fakeredis.FakeRedis(server=away, protocol=2), Keys("t:")).read))

    found = Scrape(generate_latest(registry).decode())
    assert [(sample.name, sample.value) for sample in found.samples] == [("lamella_redis_up", 0.0)]
