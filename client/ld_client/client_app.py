"""A hospital's end of the federation: a Flower ClientApp. Nothing but codes and checked tensors leaves it.

What the site is comes from its node, never from the server: in a deployment `--node-config 'home="/path"'` names the
folder that `ld-client init` made, elsewhere `--node-config 'site-config="/path/to/site.yaml"'` the site's config alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from ld_client.deployment.approvals import check_approved
from ld_client.deployment.audit_recorder import AuditRecorder
from ld_client.deployment.site_home import SiteHome
from ld_client.policy import check_hours
from ld_client.privacy.secagg_round import SecaggSiteRound
from ld_client.round import handle_train
from ld_client.site_config import SiteConfig, load_site
from ld_common.core import offline
from ld_common.core.errors import ConfigError
from ld_common.protocol import messages
from ld_common.protocol.messages import TrainTask
from ld_common.protocol.secagg.messages import Stage
from ld_common.protocol.study_config import study_from_json

offline.configure()
app = ClientApp()

Handler = Callable[[SiteConfig, AuditRecorder, Message, Context], RecordDict]


def own_home(context: Context) -> SiteHome | None:
    """This node's home, None where it has none."""
    home = context.node_config.get("home")
    return None if home is None else SiteHome(Path(str(home)))


def own_site(context: Context) -> Path:
    """This node's site config; raises `ConfigError` when it has none."""
    home = own_home(context)
    if home is not None:
        return home.config_file
    if "site-config" not in context.node_config:
        raise ConfigError("this node has no site: start it with --node-config 'site-config=\"/path/to/site.yaml\"'")
    return Path(str(context.node_config["site-config"]))


def register(
    client: ClientApp,
    site_file: Callable[[Context], Path],
    site_home: Callable[[Context], SiteHome | None] = lambda context: None,
) -> None:
    """Give a ClientApp every answer of a site.

    Args:
        client: the app.
        site_file: finds the site's config from its node.
        site_home: finds the site's home from its node; a site that has one keeps an audit log and signs what it sends.
    """

    def answer(kind: str, handle: Handler, message: Message, context: Context) -> Message:
        """Run a handler for a site; whatever goes wrong leaves as a code, never as an exception's text."""
        witness = AuditRecorder(None, kind, 0)
        try:
            witness = AuditRecorder(site_home(context), kind, context.run_id)
            witness.asked()
            site = load_site(site_file(context)) if witness.home is None else witness.home.site()
            content = handle(site, witness, message, context)
        except KeyboardInterrupt:  # a person's: it ends the process, without the text that it may hold
            raise KeyboardInterrupt from None
        except BaseException as error:  # the outermost wall: an unexpected text could hold a patient's name
            witness.refused(error)
            content = messages.pack_error(messages.error_code(error))
        return Message(content, reply_to=message)

    @client.query(messages.JOIN)
    def join(message: Message, context: Context) -> Message:
        return answer(messages.JOIN, say_name, message, context)

    @client.train()
    def train(message: Message, context: Context) -> Message:
        return answer("train", train_once, message, context)

    for stage in (Stage.KEYS, Stage.SHARES, Stage.UNMASK):
        _register_stage(client, stage, answer)


def _register_stage(
    client: ClientApp, stage: Stage, answer: Callable[[str, Handler, Message, Context], Message]
) -> None:
    def handle(site: SiteConfig, witness: AuditRecorder, message: Message, context: Context) -> RecordDict:
        request = messages.unpack_secure(message.content) or {}
        if stage is Stage.KEYS:  # a site that would not train drops out before others count on it
            check_hours(site.policy)
        payload = SecaggSiteRound(context.state).answer(site, stage, request)
        witness.left_payload(payload)
        return messages.pack_secure(payload)

    @client.query(stage.value)
    def answer_stage(message: Message, context: Context) -> Message:
        return answer(stage.value, handle, message, context)


def say_name(site: SiteConfig, witness: AuditRecorder, message: Message, context: Context) -> RecordDict:
    """Answer `join`."""
    witness.left_name(site.site)
    return messages.pack_name(site.site)


def require_approval(home: SiteHome | None, task: TrainTask) -> None:
    """Raise `ApprovalError` unless a deployed site has approved the task's study."""
    if home is not None:
        check_approved(home, study_from_json(task.study).digest(), task.base_digest, task.modality_digest)


def train_once(site: SiteConfig, witness: AuditRecorder, message: Message, context: Context) -> RecordDict:
    """Answer `train`."""
    task = messages.unpack_task(message.content)
    witness.task(task)
    require_approval(witness.home, task)
    result = handle_train(site, task, SecaggSiteRound(context.state), witness.training)
    require_approval(witness.home, task)  # somebody may have withdrawn it meanwhile
    return messages.pack_result(witness.signed(task, result))


register(app, own_site, own_home)
