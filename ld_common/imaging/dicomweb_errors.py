"""What goes wrong with a PACS, said without an identity in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import requests
import urllib3

from ld_common.core.errors import LdError
from ld_common.imaging.rejection import malformed


class PacsError(LdError):
    """A PACS cannot be reached, refuses, or answers with something else than was asked for."""

    code = "pacs"


class PacsSilent(PacsError):
    """A PACS that cannot be reached, or stopped to answer."""


@contextmanager
def closing_answer(response: requests.Response) -> Iterator[None]:
    """Close an answer that was not read to its end, whose connection cannot be used again."""
    try:
        yield
    except BaseException:
        response.close()
        raise


def strange() -> tuple[type[Exception], ...]:
    """What the libraries raise on an answer that is not DICOMweb's."""
    return (*malformed(), MemoryError, SyntaxError)


STATUS = {
    401: "does not accept the login: check --user and the password",
    403: "does not allow this user to do that",
    404: "has nothing at that address: give the address of its DICOMweb service, often ending in /dicom-web",
    409: "refuses the object",
    413: "refuses the object as too large",
    415: "does not take DICOM at that address",
}


@contextmanager
def translating(host: str) -> Iterator[None]:
    """Turn what the libraries raise into `PacsError`; their texts may quote a query, and with it a patient."""
    try:
        yield
    except LdError:
        raise
    except requests.exceptions.SSLError as error:
        raise PacsError(
            f"no TLS with {host}: its certificate is not trusted (--ca FILE) or of another name, it asks for one of "
            "this machine (--cert, --key), or it speaks plain http"
        ) from error
    except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError) as error:
        raise PacsSilent(f"{host} does not answer in time: a larger --timeout waits longer") from error
    except requests.exceptions.HTTPError as error:
        status = 0 if error.response is None else error.response.status_code
        raise PacsError(f"{host} {STATUS.get(status, 'fails')} (HTTP {status})") from error
    except (requests.exceptions.JSONDecodeError, requests.exceptions.InvalidURL, UnicodeError) as error:
        raise _no_service(host) from error
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise PacsSilent(f"no connection to {host}, or it broke: is the address right, and the PACS up?") from error
    except strange() as error:
        raise _no_service(host) from error


def _no_service(host: str) -> PacsError:
    return PacsError(f"{host} does not answer as DICOMweb does: is it the address of its DICOMweb service?")
