"""Signed certificates: a DSSE envelope (secure-systems-lab/dsse, protocol.md v1.0) around the Statement's
bytes, with Ed25519 (RFC 8032) or ECDSA over P-256 or P-384 with SHA-256 or SHA-384. The keys are PEM files;
the cryptography is that of the `cryptography` package, the extra `[sign]`."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ckpt_tool.errors import CkptToolError, fail, fail_unread, missing_package

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    Private = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey
    Public = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
PASSWORD = "CKPT_TOOL_KEY_PASSWORD"
KEY_BYTES = 1 << 16
KINDS = "an Ed25519 key, or an ECDSA key of P-256 or P-384, as PEM"
MAKES_ONE = "`openssl genpkey -algorithm ed25519 -out KEY` makes one"


def sign(payload: bytes, key: str | os.PathLike[str]) -> bytes:
    """The envelope of `payload`, signed with the private key in the PEM file `key`; of an encrypted one the
    password is in the environment variable CKPT_TOOL_KEY_PASSWORD."""
    private = _private(Path(key))
    signature = _sign(private, _encoded(payload))
    entry = {"keyid": _key_id(private.public_key()), "sig": base64.b64encode(signature).decode()}
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [entry],
    }
    return (json.dumps(envelope, indent=1, sort_keys=True) + "\n").encode()


def payload_of(envelope: dict[str, Any], file: str) -> bytes:
    """The bytes that were signed; says nothing of the signature."""
    if envelope.get("payloadType") != PAYLOAD_TYPE:
        fail("bad-config", f"expected {PAYLOAD_TYPE}", file=file, where="payloadType")
    return _base64(envelope.get("payload"), file, "payload")


def signed_by(envelope: dict[str, Any], key: str | os.PathLike[str], file: str) -> bool:
    """Whether one of the envelope's signatures is that of the public key in the PEM file `key`."""
    public = _public(Path(key))
    message = _encoded(payload_of(envelope, file))
    entries = envelope.get("signatures")
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        fail("bad-config", "expected a list of signatures", file=file, where="signatures")
    return any(_verify(public, _base64(e.get("sig"), file, "sig"), message) for e in entries)


def _encoded(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed is the type and the payload with their lengths."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _base64(text: Any, file: str, where: str) -> bytes:
    """DSSE has both alphabets, the usual and that for URLs."""
    plain = text if isinstance(text, str) and text.isascii() else "?"
    try:
        return base64.b64decode(plain.translate(str.maketrans("-_", "+/")), validate=True)
    except binascii.Error:
        fail("bad-config", "expected base64", file=file, where=where)


def _sign(key: Private, message: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(message)
    return key.sign(message, ec.ECDSA(_hash(key.curve.name)))


def _verify(key: Public, signature: bytes, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, message)
        else:
            key.verify(signature, message, ec.ECDSA(_hash(key.curve.name)))
    except InvalidSignature:
        return False
    return True


def _hash(curve: str) -> Any:
    from cryptography.hazmat.primitives import hashes

    return hashes.SHA256() if curve == "secp256r1" else hashes.SHA384()


def _key_id(key: Public) -> str:
    """SHA-256 of the public key (SubjectPublicKeyInfo, DER)."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    form = PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(Encoding.DER, form)).hexdigest()


def _private(path: Path) -> Private:
    data = _read(path, "--sign")
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        _lacking(error)
    password = os.environ.get(PASSWORD)
    try:
        key = load_pem_private_key(data, None if password is None else password.encode())
    except TypeError:  # encrypted and no password, or the other way round
        found = "an encrypted one and no password" if password is None else "one that is not encrypted"
        hint = f"{PASSWORD} holds the password of an encrypted key; unset it for others"
        fail("bad-input", f"expected a private key, found {found}", file=path, where="--sign", hint=hint)
    except (ValueError, UnsupportedAlgorithm):
        text = f"expected {KINDS}, found something else"
        fail("bad-input", text, file=path, where="--sign", hint=MAKES_ONE)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in ("secp256r1", "secp384r1"):
        return key
    fail("bad-input", f"expected {KINDS}, found {_kind(key)}", file=path, where="--sign", hint=MAKES_ONE)


def _public(path: Path) -> Public:
    data = _read(path, "--key")
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        _lacking(error)
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        hint = "`openssl pkey -in KEY -pubout` writes the public key of a private one"
        message = "expected a public key as PEM, found something else"
        fail("bad-input", message, file=path, where="--key", hint=hint)
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in ("secp256r1", "secp384r1"):
        return key
    fail("bad-input", f"expected {KINDS}, found {_kind(key)}", file=path, where="--key")


def _kind(key: object) -> str:
    """Another kind of key, by its curve or what the library calls it."""
    curve = getattr(getattr(key, "curve", None), "name", None)
    return f"another kind of key ({curve or type(key).__name__.strip('_')})"


def _read(path: Path, option: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(KEY_BYTES + 1)
    except OSError as error:
        fail_unread(error, path, option)
    if len(data) > KEY_BYTES:
        fail("bad-input", f"expected {KINDS}, found a file of more than 64 KiB", file=path, where=option)
    return data


def _lacking(error: ImportError) -> NoReturn:
    problem = missing_package(error)
    if problem is None:
        raise error
    raise CkptToolError(problem) from None
