"""The Helm charts: every value is used and named, commands are those of the images, and pods can do little."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from ld_client.cli import app as client
from ld_server.cli import app as server

FOLDER = Path(__file__).parents[2] / "configs/deployment"
CHARTS = ["site", "server"]
IMAGES = {"site": ("Containerfile", "ld-client", client), "server": ("Containerfile.server", "ld-server", server)}
FULL: dict[str, dict[str, Any]] = {
    "site": {
        "mode": "node",
        "siteConfig": "site: aster\nbase_model: /base\n",
        "kitConfigMap": "aster-kit",
        "scansClaim": "scans",
        "baseClaim": "base",
        "home": {"storageClass": "encrypted"},
        "image": {"pullSecrets": ["registry"]},
        "nodeSelector": {"gpu": "true"},
        "tolerations": [{"key": "gpu"}],
    },
    "server": {
        "mode": "server",
        "studyConfigMap": "study-files",
        "baseClaim": "base",
        "home": {"existingClaim": "study"},
        "service": {"annotations": {"internal": "true"}, "sourceRanges": ["192.0.2.0/24"]},
    },
}


def templates(chart: str) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted((FOLDER / "helm" / chart / "templates").iterdir())}


def leaves(values: dict[str, Any], path: str = "") -> Iterator[str]:
    """Paths of all values; a mapping that is given as a whole is used by its own path."""
    for key, value in values.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")


@pytest.mark.parametrize("chart", CHARTS)
def test_every_value_is_named_and_used(chart: str) -> None:
    values = set(leaves(yaml.safe_load((FOLDER / "helm" / chart / "values.yaml").read_text())))
    used = set(re.findall(r"\.Values\.([A-Za-z.]+[A-Za-z])", "\n".join(templates(chart).values())))
    assert used <= values
    parts = {path for path in values if any(path.startswith(f"{one}.") or one.startswith(f"{path}.") for one in used)}
    assert values - parts == used - parts


@pytest.mark.parametrize("chart", CHARTS)
def test_pods_run_commands_of_their_image(chart: str) -> None:
    file, name, app = IMAGES[chart]
    lines = (FOLDER / file).read_text().splitlines()
    (entry,) = [json.loads(line.partition(" ")[2]) for line in lines if line.startswith("ENTRYPOINT ")]
    (default,) = [json.loads(line.partition(" ")[2]) for line in lines if line.startswith("CMD ")]
    assert entry == [name]
    (arguments,) = re.findall(r"args: \[(.*)\]", "\n".join(templates(chart).values()))
    assert default == arguments.split(", ")
    command, *rest = default
    known = {flag for parameter in get_command(app).commands[command].params for flag in parameter.opts}  # type: ignore[attr-defined]
    assert {word for word in rest if word.startswith("--")} <= known


@pytest.fixture(params=[(chart, mode) for chart in CHARTS for mode in ("console", FULL[chart]["mode"])], ids=str)
def rendered(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Objects of a chart by kind."""
    helm = pytest.importorskip("helm_python", reason="pip install helm-python-sdk")
    chart, mode = request.param
    place = str(FOLDER / "helm" / chart)
    assert not helm.lint(place)["errors"]
    with helm.Chart.load(place) as loaded:
        texts = loaded.render(FULL[chart] | {"mode": mode}, name="aster", namespace="study").values()
    objects = [content for text in texts for content in yaml.safe_load_all(text) if content]
    return {content["kind"]: content for content in objects}


def test_a_pod_is_not_root_and_writes_to_its_volumes_alone(rendered: dict[str, dict[str, Any]]) -> None:
    pod = rendered["StatefulSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert rendered["StatefulSet"]["spec"]["replicas"] == 1
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"requests", "limits"} <= set(container["resources"])
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable in ({"/site", "/tmp"}, {"/study", "/tmp"})
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_a_site_is_reached_by_nobody_and_reaches_the_server_alone(rendered: dict[str, dict[str, Any]]) -> None:
    policy = rendered["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    if "ConfigMap" not in rendered:  # the server's chart
        assert policy["egress"] == []
        return
    assert policy["ingress"] == []
    server, names = policy["egress"]
    assert server["to"] == [{"ipBlock": {"cidr": "192.0.2.10/32"}}]
    assert [port["port"] for port in server["ports"]] == [9092, 9093]
    assert {port["port"] for port in names["ports"]} == {53}


def test_only_a_console_sees_scans(rendered: dict[str, dict[str, Any]]) -> None:
    (container,) = rendered["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert ("/scans" in mounts) == ("ConfigMap" in rendered and container["name"] == "console")
    assert ("livenessProbe" in container) == (container["name"] != "console")
