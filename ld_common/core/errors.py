"""Every error that a user can cause. A command prints it as one line and exits with code 2.

LdError                 only its `code` may cross the wire
├── ConfigError         a config file, an override or a command-line value
├── ScanError           an image file that cannot be used
├── TableError          a site's table of visits
├── StoreError          a site's store: absent, empty, of another base model
├── ModelError          a base model folder
├── AdapterError        a named set of tensors that does not fit its base
├── ReleaseError        a release folder: absent, altered, of another base
├── RequestError        a request for a counterfactual that cannot be drawn
├── PolicyError         a study that asks for more than the site allows
├── PrivacyError        a spent budget, or a study that cannot be private
├── CheckpointError     a checkpoint that cannot be written or read
├── FederationError     a federation that cannot start or continue
├── SignatureError      an unusable key, or an invalid signature
├── DeploymentError     a study's or site's folder, kit, certificate or process
├── ApprovalError       a study or its code that the site has not approved
├── PacsError           a PACS that is silent, refuses or answers wrongly (in `ld_common.imaging.dicomweb_errors`)
├── HeldOutError        a validation without enough held-out patients (in `ld_client.validation`)
├── AuditError          an audit that these scans do not allow (in `ld_client.audit.statistics`)
└── DivergedError       training whose loss is not finite (in `ld_common.diffusion.training`)
"""

from __future__ import annotations


class LdError(Exception):
    """Base of all errors that a user can cause; the message gives the problem, the value and the remedy."""

    code = "error"


class ConfigError(LdError):
    """A config file, an override or a command-line value is wrong."""

    code = "config"


class ScanError(LdError):
    """An image file cannot be used."""

    code = "scan"


class TableError(LdError):
    """A site's table of visits cannot be used."""

    code = "table"


class StoreError(LdError):
    """A site's store is absent, empty or of another base model."""

    code = "store"


class ModelError(LdError):
    """A base model folder cannot be used."""

    code = "model"


class AdapterError(LdError):
    """A named set of tensors does not fit its base model or adapter."""

    code = "adapter"


class ReleaseError(LdError):
    """A release is absent, altered or belongs to another base model."""

    code = "release"


class RequestError(LdError):
    """A requested counterfactual cannot be drawn."""

    code = "request"


class PolicyError(LdError):
    """A study asks for more than the site allows."""

    code = "policy"


class PrivacyError(LdError):
    """A privacy budget is spent, or training cannot be made private."""

    code = "privacy"


class CheckpointError(LdError):
    """A checkpoint cannot be written or read."""

    code = "checkpoint"


class FederationError(LdError):
    """A federation cannot start or continue."""

    code = "federation"


class SignatureError(LdError):
    """A key cannot be used, or a signature is invalid."""

    code = "signature"


class DeploymentError(LdError):
    """A study's or site's folder, kit, certificate or process cannot be used."""

    code = "deployment"


class ApprovalError(LdError):
    """A study or its code was not approved at the site."""

    code = "approval"
