"""Intrusion attempts against a running study, by name, and whether each was refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import httpx
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.supercore.fab import Fab
from google.protobuf.empty_pb2 import Empty
from google.protobuf.struct_pb2 import Struct

from ld_client.deployment.site_home import SiteHome
from ld_common.core.errors import DeploymentError
from ld_common.core.processes import environment, free_port, stop_family, tool
from ld_common.protocol.keys import PrivateKey, new_elliptic_key, private_pem, write_private_key
from ld_common.release.service_messages import LIST, method, parser, serialize
from ld_server.deployment import superlink
from ld_server.deployment.bundle import bundle_files, pack
from ld_server.deployment.certificates import certify_site, make_authority, pem
from ld_server.deployment.provision import revoke
from ld_simulations.benchmarks.deployment.stage import STARTUP_SECONDS, Deployment

NODE_SECONDS = 20.0
"""Longer than an accepted node needs to connect."""
GOT_IN = "SuperNode ID"
"""In the log of Flower's node once the server has accepted it."""
BUNDLE_SECONDS = 150.0


def try_intruders(deployment: Deployment) -> dict[str, bool]:
    """Every attempt by name, and whether it was refused. The last site is revoked at the end."""
    attempts: dict[str, Callable[[Deployment], bool]] = {
        "node without a key": lambda stage: _node_refused(stage, None, "authority"),
        "node with a foreign key": _foreign_node,
        "node that meets another authority's server": _wrong_server,
        "control API through the gate": _control_api,
        "runtime API through the gate": _runtime_api,
        "control API without TLS": _plain_control,
        "releases with a foreign key": _foreign_pull,
        "releases with another authority's certificate": _wrong_authority_pull,
        "releases with an expired certificate": _expired_pull,
        "releases under another site's name": _other_name_pull,
        "bundle that no site approved": _unapproved_bundle,
        # last: a revoked key cannot come back, and the attempts above need every site
        "node of a revoked site": _revoked_node,
        "releases as a revoked site": _revoked_pull,
    }
    _wait_for_sites(deployment)
    return {name: attempt(deployment) for name, attempt in attempts.items()}


def _wait_for_sites(stage: Deployment) -> None:
    """Wait for every site's node: a later one would look like an intruder."""
    deadline = time.monotonic() + STARTUP_SECONDS
    while len(_online(stage)) < len(stage.sites):
        if time.monotonic() > deadline:
            raise DeploymentError(
                f"only {len(_online(stage))} of {len(stage.sites)} sites connected: see their node.log"
            )
        time.sleep(1.0)


def _node_refused(stage: Deployment, key: Path | None, authority: str, root: Path | None = None) -> bool:
    """Whether Flower's own SuperNode, started like a site's, fails to get in.

    Judged by the server's list of nodes and by the node's log: a node that takes the place of a site which has just
    left is not a new name on the list.
    """
    before = _online(stage)
    command = [tool("flower-supernode"), "--superlink", f"localhost:{stage.home.server().gate_port}"]
    command += ["--root-certificates", str(root or stage.home.certificate(authority))]
    command += ["--host", "127.0.0.1", "--port", str(free_port())]
    command += [] if key is None else ["--auth-supernode-private-key", str(key)]
    log = stage.folder / "intruder.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=environment(stage.folder / "flower"), stdout=stream, stderr=stream)
    deadline = time.monotonic() + NODE_SECONDS
    try:
        while time.monotonic() < deadline and process.poll() is None:
            if not _online(stage) <= before or GOT_IN in log.read_text(errors="replace"):
                return False
            time.sleep(0.5)
        return _online(stage) <= before and GOT_IN not in log.read_text(errors="replace")
    finally:
        stop_family(process.pid)


def _online(stage: Deployment) -> set[int]:
    with superlink.control(stage.home) as client:
        return {node.id for node in superlink.nodes(client) if node.status == "online"}


def _foreign_node(stage: Deployment) -> bool:
    key = stage.folder / "intruder" / "foreign.key"
    shutil.rmtree(key.parent, ignore_errors=True)
    write_private_key(key, new_elliptic_key(), openssh=True)
    return _node_refused(stage, key, "authority")


def _revoked_node(stage: Deployment) -> bool:
    return _node_refused(stage, _revoked(stage).node_key, "authority")


def _wrong_server(stage: Deployment) -> bool:
    """A site with another authority must not talk to this server."""
    root = stage.folder / "intruder" / "other-authority.crt"
    root.parent.mkdir(exist_ok=True)
    root.write_bytes(pem(make_authority("other")[1]))
    site = stage.sites[sorted(stage.sites)[0]]
    stage.stop([site.path.name])
    refused = _node_refused(stage, site.node_key, "", root)
    stage.start(site.path.name)
    _wait_for_sites(stage)
    return refused


def _control_api(stage: Deployment) -> bool:
    return _gate_refuses(stage, ["/v1/control/list-runs", "/v1/control/start-run", "/v1/fleet/../control/list-runs"])


def _runtime_api(stage: Deployment) -> bool:
    return _gate_refuses(stage, ["/v1/runtime/acquire-task", "/v1/runtime/pull-messages"])


def _gate_refuses(stage: Deployment, paths: list[str]) -> bool:
    url = f"https://localhost:{stage.home.server().gate_port}"
    headers = {"content-type": "application/x-protobuf"}
    with httpx.Client(verify=str(stage.home.certificate("authority")), trust_env=False) as client:
        return all(client.post(url + path, content=b"", headers=headers).status_code == 404 for path in paths)


def _plain_control(stage: Deployment) -> bool:
    try:
        httpx.post(
            f"http://localhost:{stage.home.server().gate_port}/v1/control/list-runs", content=b"", trust_env=False
        )
    except httpx.HTTPError:
        return True
    return False


def _service_refuses(stage: Deployment, key: PrivateKey, certificate: x509.Certificate) -> bool:
    """Whether the release service refuses this key and certificate, and accepts those of a site."""
    site = stage.sites[sorted(stage.sites)[0]]
    if not _lists(stage, site.key("certificate"), stage.home.site_certificate(site.path.name).read_bytes()):
        raise DeploymentError("the site itself gets no list, so a refused intruder proves nothing")
    return not _lists(stage, key, pem(certificate))


def _lists(stage: Deployment, key: PrivateKey, certificate: bytes) -> bool:
    """Call the service without our client, which does not even try with a bad certificate."""
    authority = stage.home.certificate("authority").read_bytes()
    credentials = grpc.ssl_channel_credentials(authority, private_pem(key), certificate)
    with grpc.secure_channel(f"localhost:{stage.home.server().release_port}", credentials) as channel:
        call = channel.unary_unary(method(LIST), serialize, parser(Struct))
        try:
            call(Empty(), timeout=10)
        except grpc.RpcError:
            return False
        return True


def _foreign_pull(stage: Deployment) -> bool:
    """A key that the study's authority certified and nobody admitted."""
    key = new_elliptic_key()
    return _service_refuses(stage, key, certify_site(*stage.home.authority(), key.public_key(), sorted(stage.sites)[0]))


def _wrong_authority_pull(stage: Deployment) -> bool:
    name, key = _first(stage)
    return _service_refuses(stage, key, certify_site(*make_authority("other"), key.public_key(), name))


def _expired_pull(stage: Deployment) -> bool:
    name, key = _first(stage)
    return _service_refuses(stage, key, certify_site(*stage.home.authority(), key.public_key(), name, days=-1))


def _other_name_pull(stage: Deployment) -> bool:
    """An admitted key under the name of another site."""
    _, key = _first(stage)
    return _service_refuses(stage, key, certify_site(*stage.home.authority(), key.public_key(), sorted(stage.sites)[1]))


def _revoked_pull(stage: Deployment) -> bool:
    site = _revoked(stage)
    return not _lists(stage, site.key("certificate"), stage.home.site_certificate(site.path.name).read_bytes())


def _first(stage: Deployment) -> tuple[str, ec.EllipticCurvePrivateKey]:
    name = sorted(stage.sites)[0]
    return name, stage.sites[name].key("certificate")


def _revoked(stage: Deployment) -> SiteHome:
    """The last site, revoked for good and its node stopped."""
    name = sorted(stage.sites)[-1]
    if stage.home.sites()[name].revoked is None:
        stage.stop([name])
        revoke(stage.home, name)
    return stage.sites[name]


def _unapproved_bundle(stage: Deployment) -> bool:
    """A bundle with one more file, which would leave a mark at the site, is run by someone with the control API."""
    mark = stage.folder / "intruder" / "ran"
    mark.unlink(missing_ok=True)
    files = bundle_files()
    evil = f"open({json.dumps(str(mark))}, 'w').close()\n".encode()
    files["ld_client/app.py"] = evil + bytes(files["ld_client/app.py"])
    content = pack(files)
    fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
    config = user_config_to_proto({"home": str(stage.home.path), "resume": True})
    with superlink.control(stage.home) as client:
        run = client.StartRun(StartRunRequest(fab=fab_to_proto(fab), override_config=config)).run_id
        deadline = time.monotonic() + BUNDLE_SECONDS
        while time.monotonic() < deadline and not _all_refused(stage) and not mark.exists():
            time.sleep(1)
        superlink.stop_run(client, run)
    return _all_refused(stage) and not mark.exists()


def _all_refused(stage: Deployment) -> bool:
    logs = [(site.path / "node.log").read_text(errors="replace") for site in stage.sites.values()]
    return all("is not approved" in log for log in logs)
