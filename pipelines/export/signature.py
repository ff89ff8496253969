"""Who made an archive: SHA256SUMS over all files, signed by OpenSSH's own command (``ssh-keygen -Y``).

The signature covers the list, the list covers the files. Keys, agents and smart cards are those that a hospital's
administrators know; nothing here handles a private key.
"""

from __future__ import annotations

import base64
import binascii
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from transforms.errors import DataError, ResourceError

NAMESPACE = "fiducial-bundle"
SUMS, SIGNATURE = "SHA256SUMS", "SHA256SUMS.sig"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_BEGIN, _END, _WIDTH = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----", 70


def sums_of(digests: Mapping[str, str]) -> bytes:
    """Return the text of ``SHA256SUMS``, as ``sha256sum -c`` reads it, sorted by name."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()


def digests_of(sums: bytes, where: str) -> dict[str, str]:
    """Return digest by name of a ``SHA256SUMS`` that is exactly what ``sums_of`` writes.

    Raises:
        DataError: it is not.
    """
    try:
        lines = sums.decode().splitlines()
    except UnicodeDecodeError as problem:
        raise _refused(where, f"{SUMS} is no text") from problem
    matches = [_LINE.fullmatch(line) for line in lines]
    digests = {match[2]: match[1] for match in matches if match}
    if None in matches or sums_of(digests) != sums:
        raise _refused(where, f"{SUMS} is not a sorted list of digests and names")
    return digests


def sign(sums: bytes, key: str | Path) -> bytes:
    """Return the signature of ``SHA256SUMS``.

    Args:
        sums: the text.
        key: a private key, or a public one whose private key an agent holds.

    Raises:
        DataError: OpenSSH refuses the key.
        ResourceError: there is no ssh-keygen.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / SUMS
        file.write_bytes(sums)
        done = _ssh_keygen(["-Y", "sign", "-n", NAMESPACE, "-f", str(Path(key).expanduser()), str(file)])
        if done.returncode:
            raise DataError(
                f"key {key}: cannot sign", _last_line(done), "give an OpenSSH key, without a password prompt"
            )
        return (Path(folder) / SIGNATURE).read_bytes()


def check_signature(sums: bytes, signature: bytes, allowed_signers: str | Path | None, where: str) -> str:
    """Return who has signed: the principal of the list, or without a list the fingerprint of the key.

    Args:
        sums: the signed text.
        signature: armoured, as ``sign`` returns it.
        allowed_signers: OpenSSH's file of principals and keys; None = the signature must hold, whoever made it.
        where: of the archive, for messages.

    Raises:
        DataError: the signature does not hold, or nobody on the list has made it.
        ResourceError: there is no ssh-keygen.
    """
    if _armoured(signature) != signature:
        raise _refused(where, "its signature is not written as OpenSSH writes one")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / SIGNATURE
        file.write_bytes(signature)
        if allowed_signers is None:
            done = _ssh_keygen(["-Y", "check-novalidate", "-n", NAMESPACE, "-s", str(file)], sums)
            if done.returncode:
                raise _refused(where, f"its signature does not hold: {_last_line(done)}")
            return _last_line(done)
        listed = ["-f", str(allowed_signers), "-s", str(file)]
        found = _ssh_keygen(["-Y", "find-principals", *listed], sums)
        principals = found.stdout.decode(errors="replace").split()
        if found.returncode or not principals:
            raise _refused(where, f"nobody in {allowed_signers} has signed it: {_last_line(found)}")
        done = _ssh_keygen(["-Y", "verify", "-n", NAMESPACE, "-I", principals[0], *listed], sums)
        if done.returncode:
            raise _refused(where, f"its signature does not hold: {_last_line(done)}")
        return principals[0]


def _armoured(signature: bytes) -> bytes:
    """Return the signature as OpenSSH would write its bytes, or nothing where it is none."""
    try:
        lines = signature.decode("ascii").split("\n")
        blob = base64.b64decode("".join(lines[1:-2]), validate=True)
    except (UnicodeDecodeError, binascii.Error, ValueError):
        return b""
    text = base64.b64encode(blob).decode()
    body = [text[start : start + _WIDTH] for start in range(0, len(text), _WIDTH)]
    return "\n".join([_BEGIN, *body, _END, ""]).encode()


def _ssh_keygen(arguments: list[str], stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("ssh-keygen")
    if program is None:
        raise ResourceError("ssh-keygen: not found", "signatures are OpenSSH's", "install the OpenSSH client")
    return subprocess.run([program, *arguments], input=stdin, capture_output=True, timeout=60, check=False)


def _last_line(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def _refused(where: str, why: str) -> DataError:
    return DataError(f"{where}: refused", why, "fetch it again from its maker, and their key from a second source")
