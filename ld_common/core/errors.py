"""Every error that a user can cause.

LdError                 exit 2, one line; `code` is all of it that may cross the wire
├── ConfigError         a config file, an override or a command-line value
├── ScanError           an image file that cannot be used
├── TableError          a site's table of visits
├── StoreError          a site's store: absent, empty, of another base model
├── ModelError          a base model folder
├── AdapterError        a named set of tensors that does not fit its base
├── ReleaseError        a release folder: absent, altered, of another base
├── RequestError        a counterfactual that was asked for and cannot be drawn
├── PolicyError         a study that asks for more than the site allows
├── PrivacyError        a budget that is spent, or a study that cannot be private
├── CheckpointError     a checkpoint that cannot be written or read
├── FederationError     a federation that cannot start or go on
├── SignatureError      a key that cannot be used, or a signature that does not hold
├── DeploymentError     a study's or a site's folder, a kit, a certificate, a process of theirs
├── ApprovalError       a study or its code that the site has not approved
├── AuditError          an audit that these scans cannot answer (in `ld_client.audit.statistics`)
└── DivergedError       training whose loss is not finite (in `ld_common.diffusion.training`)
"""

from __future__ import annotations


class LdError(Exception):
    """Base of all errors that a user can cause; its text says what is wrong, the value and the remedy."""

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
    """A counterfactual was asked for that cannot be drawn."""

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
    """A federation cannot start or go on."""

    code = "federation"


class SignatureError(LdError):
    """A key cannot be used, or a signature does not hold."""

    code = "signature"


class DeploymentError(LdError):
    """A study's or a site's folder, a kit, a certificate or a process of theirs cannot be used."""

    code = "deployment"


class ApprovalError(LdError):
    """A study or its code was not approved at the site."""

    code = "approval"
