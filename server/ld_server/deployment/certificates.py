"""The study's certificate authority: issues the server's certificate and one for each admitted site's key."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_DAYS, SERVER_DAYS, SITE_DAYS = 3650, 825, 825
MAX_NAME_BYTES = 64
"""Length of a common name (X.520), in UTF-8."""
BACKDATED = datetime.timedelta(minutes=10)
"""Certificates are valid from this much before now, as clocks differ."""


def make_authority(study: str, days: float = CA_DAYS) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Make a study's certificate authority; returns its key and certificate."""
    key = ec.generate_private_key(ec.SECP384R1())
    ending = " certificate authority"
    name = _name(_cut(study, MAX_NAME_BYTES - len(ending)) + ending)
    builder = _builder(name, name, key.public_key(), days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
    return key, builder.sign(key, hashes.SHA384())


def certify_server(
    authority_key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    key: ec.EllipticCurvePublicKey,
    hosts: Sequence[str],
    days: float = SERVER_DAYS,
) -> x509.Certificate:
    """A server certificate for host names (ASCII) and IP addresses."""
    alternatives = [_alternative(host) for host in dict.fromkeys(hosts)]
    builder = _leaf(
        authority_key, authority, key, _cut(hosts[0], MAX_NAME_BYTES), days, ExtendedKeyUsageOID.SERVER_AUTH
    )
    builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return builder.sign(authority_key, hashes.SHA384())


def certify_site(
    authority_key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    key: ec.EllipticCurvePublicKey,
    site: str,
    days: float = SITE_DAYS,
) -> x509.Certificate:
    """A client certificate whose common name is the site."""
    builder = _leaf(authority_key, authority, key, site, days, ExtendedKeyUsageOID.CLIENT_AUTH)
    return builder.sign(authority_key, hashes.SHA384())


def pem(certificate: x509.Certificate) -> bytes:
    """A certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def _leaf(
    authority_key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    key: ec.EllipticCurvePublicKey,
    name: str,
    days: float,
    usage: x509.ObjectIdentifier,
) -> x509.CertificateBuilder:
    builder = _builder(_name(name), authority.subject, key, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(digital_signature=True), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return builder.add_extension(issuer, critical=False)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    # tests make expired certificates, whose period must still be valid
    begins = min(now, now + datetime.timedelta(days=days)) - BACKDATED
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _cut(text: str, limit: int) -> str:
    """A text cut to `limit` bytes of UTF-8; the names of authority and server are for people only."""
    return text.encode()[:limit].decode(errors="ignore")


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
