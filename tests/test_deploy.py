"""What a server is deployed with: image, unit, settings, Grafana board, workflows; read against what they name."""

from __future__ import annotations

import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.specifiers import SpecifierSet

from pagedkv.cli.app import app

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
SERVE = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]


# The image.


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile, each on one line."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def of_kind(kind: str) -> list[str]:
    return [rest for name, rest in instructions() if name == kind]


def from_context() -> list[str]:
    """Return what is copied out of the repository."""
    copied = [rest for rest in of_kind("COPY") if "--from=" not in rest]
    return [name for rest in copied for name in rest.split()[:-1]]


def test_the_image_has_a_python_that_is_supported() -> None:
    images = [rest.split()[0] for rest in of_kind("FROM")]
    assert len(images) == 2 and len(set(images)) == 1
    version = images[0].removeprefix("python:").removesuffix("-slim")
    assert version in SpecifierSet(PROJECT["requires-python"])
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


def test_the_image_installs_pinned_versions_and_extras_that_there_are() -> None:
    calls = [call for rest in of_kind("RUN") for call in rest.split("&&") if "pip install" in call]
    assert len(calls) == 2 and all("-c constraints.txt" in call for call in calls)
    assert f"torch=={PINS['torch']}" in calls[0].split()
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", calls[1])
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])


def test_the_image_has_what_options_of_the_server_need() -> None:
    """Each extra that `serve` asks for where its package is missing, but for those of one kind of model or device."""
    sources = [*(ROOT / "src/pagedkv/server").rglob("*.py"), *(ROOT / "src/pagedkv/tiers").glob("*.py")]
    needed = {
        extra
        for path in sources
        for extra in re.findall(r'MissingExtra\([^"]*(?:"[\w-]+", )?"(\w+)"', path.read_text())
    }
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", " ".join(of_kind("RUN")))
    assert {"serve", "events", "resp"} <= needed and needed - {"torch"} <= set(extras.split(","))


def test_the_image_is_built_of_what_it_copies(tmp_path: Path) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name in from_context():
        assert f"!{name}" in ignored
        if (ROOT / name).is_dir():
            (tmp_path / name).symlink_to(ROOT / name)
        else:
            shutil.copy(ROOT / name, tmp_path)
    build = "from hatchling.build import prepare_metadata_for_build_wheel as make; print(make('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_image_serves_as_a_user_without_rights() -> None:
    names = [name for name, _ in instructions()]
    assert of_kind("USER") == ["pagedkv"] and names.index("USER") > max(i for i, n in enumerate(names) if n == "RUN")
    assert json.loads(of_kind("ENTRYPOINT")[0]) == ["pagedkv"]
    command, *options = json.loads(of_kind("CMD")[0])
    told = SERVE.make_context(command, options).params
    assert told["host"] == "0.0.0.0" and of_kind("EXPOSE") == [str(told["port"])]
    assert f"http://127.0.0.1:{told['port']}/health" in of_kind("HEALTHCHECK")[0]
    assert str(told["disk"]).startswith(of_kind("VOLUME")[0] + "/")
    *_, code = json.loads(of_kind("HEALTHCHECK")[0].partition("CMD ")[2])
    ast.parse(code)


# The unit of systemd, and its settings.

UNIT = ROOT / "deploy" / "pagedkv.service"


def unit() -> configparser.ConfigParser:
    read = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    read.optionxform = str  # type: ignore[assignment,method-assign]
    read.read_string(UNIT.read_text())
    return read


def test_the_unit_serves_with_the_settings_beside_it() -> None:
    program, command, *options = unit()["Service"]["ExecStart"].split()
    assert Path(program).name in PROJECT["scripts"] and command == "serve"
    assert options == ["--config", "/etc/pagedkv/server.toml"]
    told = SERVE.make_context("serve", ["--config", str(ROOT / "deploy" / "server.toml")]).params
    assert told["host"] == "127.0.0.1" and str(told["disk"]).startswith("/var/cache/pagedkv/")
    assert unit()["Service"]["CacheDirectory"] == "pagedkv"


def test_the_unit_waits_for_requests_and_has_files_for_connections() -> None:
    told = SERVE.make_context("serve", []).params
    service = unit()["Service"]
    assert int(service["TimeoutStopSec"]) > float(told["drain_timeout"])
    assert int(service["LimitNOFILE"]) > 5 * int(told["max_connections"])
    # Kernels are compiled in the process, so that one thing stays allowed.
    assert "MemoryDenyWriteExecute" not in service and service["NoNewPrivileges"] == "yes"
    assert service["CapabilityBoundingSet"] == "" and service["ProtectSystem"] == "strict"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="a machine without systemd")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    copy = tmp_path / "pagedkv.service"
    copy.write_text(UNIT.read_text().replace("/opt/pagedkv/bin/pagedkv", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=60)
    assert [line for line in done.stderr.splitlines() if "pagedkv.service" in line] == []


@pytest.mark.parametrize("page", ["deploy.md", "server.md"])
def test_the_settings_of_the_guides_are_settings(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"^```toml\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.M | re.S)
    assert blocks
    for block in blocks:
        (tmp_path / "server.toml").write_text(block)
        told = SERVE.make_context("serve", ["--config", str(tmp_path / "server.toml"), "--port", "9000"]).params
        assert str(told["port"]) == "9000" and len(tomllib.loads(block)) >= 3


def test_the_files_and_options_that_the_guide_names_are_there() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()
    files = set(re.findall(r"\bdeploy/[\w.]+", text)) | {"Dockerfile"}
    assert len(files) == 4 and [name for name in files if not (ROOT / name).exists()] == []
    options = {flag for each in SERVE.params for flag in each.opts}
    told = set(re.findall(r"pagedkv serve[^`\n]*?(--[\w-]+)", text)) | set(re.findall(r"`(--[\w-]+)`", text))
    assert {"--config", "--drain-timeout"} <= told <= options


# The Grafana board.

BOARD = json.loads((ROOT / "deploy" / "grafana.json").read_text())
KEPT_BY_PROMETHEUS = {"instance", "le"}


def emitted() -> dict[str, set[str]]:
    """Return every series of a server with a tier, and the labels that it has."""
    from prometheus_client.parser import text_string_to_metric_families
    from tests.server.fake_snapshots import FakeEngine, server_state

    from pagedkv.server.metrics import ServerMetrics
    from pagedkv.tiers.rung import TierFigures

    engine = FakeEngine(64)
    engine.tier_figures = (TierFigures(medium="DISK"),)
    text = ServerMetrics(server_state(engine)).text().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


def asked() -> list[tuple[str, dict[str, Any]]]:
    """Return the title of a panel and a target of it, for all of them."""
    return [(panel["title"], target) for panel in BOARD["panels"] for target in panel.get("targets", [])]


def test_the_board_asks_for_metrics_and_labels_that_there_are() -> None:
    pytest.importorskip("prometheus_client")
    series = emitted()
    assert len(asked()) >= 40
    for title, target in asked():
        names = re.findall(r"pagedkv:\w+", target["expr"])
        assert names and set(names) <= set(series), title
        known = set.intersection(*(series[name] for name in names)) | KEPT_BY_PROMETHEUS
        matched = re.findall(r"(\w+)=~?\"", target["expr"])
        grouped = [
            label.strip() for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in group.split(",")
        ]
        shown = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
        assert {*matched, *grouped, *shown} <= known, title


def test_the_board_takes_rates_of_counters_and_quantiles_of_histograms() -> None:
    for title, target in asked():
        for name in re.findall(r"rate\((pagedkv:\w+)", target["expr"]):
            assert name.endswith(("_total", "_bucket", "_sum", "_count")), title
        plain = re.sub(r"rate\(pagedkv:\w+", "", target["expr"])
        assert not re.search(r"pagedkv:\w+_(total|bucket|sum|count)\b", plain), title
        assert ("histogram_quantile(" in target["expr"]) == ("_bucket" in target["expr"]), title


def test_the_board_names_its_source_and_has_no_overlaps() -> None:
    names = {variable["name"] for variable in BOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD))) - {"__rate_interval", "__all"}
    assert used == names == {"datasource", "model", "instance"}
    places = [
        (x, y)
        for panel in BOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places)) and max(x for x, _ in places) < 24
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


# Continuous integration.

JOBS = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]


def commands(job: str) -> str:
    return "\n".join(step["run"] for step in JOBS[job]["steps"] if "run" in step)


def test_continuous_integration_runs_what_is_run_here_on_every_python() -> None:
    classified = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", each) for each in PROJECT["classifiers"]]
    assert JOBS["test"]["strategy"]["matrix"]["python"] == [each[1] for each in classified if each]
    assert commands("test") == ".ci/run" and (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_continuous_integration_makes_what_there_is_to_make() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for job in JOBS:
        for line in re.findall(r"^make (.+)$", commands(job), re.M):
            assert all(re.search(rf"^{target}:", makefile, re.M) for target in line.split())
    assert "make dist docs" in commands("build") and "docker build" in commands("image")
