"""A site's Flower ClientApp. Only error codes and checked tensors leave it.

The node, never the server, tells it which site it is: a deployed node is started with `--node-config 'home="/path"'`,
the folder that `ld-client init` made; any other with `--node-config 'site-config="/path/to/site.yaml"'`. `launcher` and
`training-processes` beside them replace those of the site's config.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from ld_client.deployment.approvals import allow_approved_packages, approved_identity, check_approved
from ld_client.deployment.audit_recorder import AuditRecorder
from ld_client.deployment.site_home import SiteHome
from ld_client.policy import check_hours
from ld_client.privacy.ledger import Ledger
from ld_client.privacy.secagg_round import SecaggSiteRound
from ld_client.round import handle_train
from ld_client.site_config import LAUNCHER, PROCESSES, SiteConfig, load_site
from ld_client.validation import handle_validate
from ld_common.core import offline
from ld_common.core.errors import ConfigError
from ld_common.protocol import messages
from ld_common.protocol.messages import TrainTask
from ld_common.protocol.secagg.messages import Stage
from ld_common.protocol.study_config import study_from_json

offline.configure()
app = ClientApp()

Handler = Callable[[SiteConfig, AuditRecorder, Message, SecaggSiteRound], RecordDict]


def home_of_node(context: Context) -> SiteHome | None:
    """The home of a deployed node; None where it has none."""
    home = context.node_config.get("home")
    return None if home is None else SiteHome(Path(str(home)))


def site_file_of_node(context: Context) -> Path:
    """The node's site config; raises `ConfigError` when it has none."""
    home = home_of_node(context)
    if home is not None:
        return home.config_file
    if "site-config" not in context.node_config:
        raise ConfigError("this node has no site: start it with --node-config 'site-config=\"/path/to/site.yaml\"'")
    return Path(str(context.node_config["site-config"]))


def launched(site: SiteConfig, context: Context) -> SiteConfig:
    """The site's config with the launcher that its node was started with; raises `ConfigError`."""
    launcher, processes = (context.node_config.get(key, default) for key, default in ((LAUNCHER, ""), (PROCESSES, 0)))
    return site.launched(str(launcher), int(str(processes)))


def register(
    client: ClientApp,
    site_file: Callable[[Context], Path],
    site_home: Callable[[Context], SiteHome | None] = lambda context: None,
) -> None:
    """Register the handlers of a site with a ClientApp.

    Args:
        client: the app.
        site_file: returns the node's site config.
        site_home: returns the node's home; a site with a home keeps an audit log and signs its results.
    """

    def answer(kind: str, handle: Handler, message: Message, context: Context) -> Message:
        """Run a handler; an error leaves as a code, never as its text."""
        recorder = AuditRecorder(None, kind, 0)
        try:
            recorder = AuditRecorder(site_home(context), kind, context.run_id)
            recorder.record_request()
            allow_approved_packages(recorder.home)
            site = load_site(site_file(context)) if recorder.home is None else recorder.home.site()
            site = launched(site, context)
            secure = secure_rounds(site, recorder.home)
            with secure.alone():
                content = handle(site, recorder, message, secure)
        except KeyboardInterrupt:  # ends the process, without the text that it may hold
            raise KeyboardInterrupt from None
        except BaseException as error:  # the outermost handler: the text of an unexpected error could name a patient
            recorder.record_refusal(error)
            content = messages.pack_error(messages.error_code(error))
        return Message(content, reply_to=message)

    @client.query(messages.JOIN)
    def join(message: Message, context: Context) -> Message:
        return answer(messages.JOIN, handle_join, message, context)

    @client.train()
    def train(message: Message, context: Context) -> Message:
        return answer("train", handle_train_message, message, context)

    @client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer("evaluate", handle_evaluate_message, message, context)

    for stage in (Stage.KEYS, Stage.SHARES, Stage.UNMASK):
        _register_stage(client, stage, answer)


def _register_stage(
    client: ClientApp, stage: Stage, answer: Callable[[str, Handler, Message, Context], Message]
) -> None:
    def handle(site: SiteConfig, recorder: AuditRecorder, message: Message, secure: SecaggSiteRound) -> RecordDict:
        request = messages.unpack_secure(message.content) or {}
        if stage is Stage.KEYS:  # a site that would not train drops out before others rely on its shares
            check_hours(site.policy)
        payload = secure.answer(stage, request)
        recorder.record_sent_payload(payload)
        return messages.pack_secure(payload)

    @client.query(stage.value)
    def answer_stage(message: Message, context: Context) -> Message:
        return answer(stage.value, handle, message, context)


def secure_rounds(site: SiteConfig, home: SiteHome | None) -> SecaggSiteRound:
    """The state of a site's secure rounds: in its home, or beside its ledger where it has none."""
    if home is None:
        return SecaggSiteRound(site.ledger_path.parent / "secure-aggregation", site)
    study = home.study()
    identity = approved_identity(home) if study.federation.secure_aggregation else None
    return SecaggSiteRound(home.secure_rounds, site, study, identity)


def handle_join(site: SiteConfig, recorder: AuditRecorder, message: Message, secure: SecaggSiteRound) -> RecordDict:
    """Answer a `join` query with the site's name."""
    recorder.record_sent_name(site.site)
    return messages.pack_name(site.site)


def require_approval(home: SiteHome | None, task: TrainTask) -> None:
    """Raise `ApprovalError` unless a deployed site has approved the task's study; others have no approvals."""
    if home is not None:
        check_approved(home, study_from_json(task.study).digest(), task.base_digest, task.modality_digest)


def accepted_task(site: SiteConfig, recorder: AuditRecorder, message: Message) -> TrainTask:
    """A message's task, recorded, when the site's ledger and log are whole and it has approved the study."""
    task = messages.unpack_task(message.content)
    recorder.record_task(task)
    recorder.check_ledger(Ledger(site.ledger_path))
    recorder.check_withdrawals(site.store_path)
    require_approval(recorder.home, task)
    return task


def handle_train_message(
    site: SiteConfig, recorder: AuditRecorder, message: Message, secure: SecaggSiteRound
) -> RecordDict:
    """Answer a training task."""
    task = accepted_task(site, recorder, message)
    result = handle_train(site, task, secure, recorder.record_training)
    require_approval(recorder.home, task)  # it may have been withdrawn meanwhile
    return messages.pack_result(recorder.sign_result(task, result))


def handle_evaluate_message(
    site: SiteConfig, recorder: AuditRecorder, message: Message, secure: SecaggSiteRound
) -> RecordDict:
    """Answer a validation task."""
    task = accepted_task(site, recorder, message)
    result = handle_validate(site, task)
    require_approval(recorder.home, task)
    return messages.pack_result(recorder.sign_result(task, result))


register(app, site_file_of_node, home_of_node)
