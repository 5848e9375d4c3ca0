"""A scheduler behind TLS, with the certificates that Dask's own configuration names."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.conftest import clean_env
from tests.faults.killer import hashes
from tests.make import tiny

pytestmark = pytest.mark.slow

pytest.importorskip("distributed")
pytest.importorskip("cryptography")

WAIT = 60


def _authority(folder: Path, name: str) -> Mapping[str, str]:
    """Make an authority and a certificate of it for 127.0.0.1; return Dask's settings that name them."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes as digests
    from cryptography.hazmat.primitives import serialization as plain
    from cryptography.hazmat.primitives.asymmetric import ec

    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"{name} {i}")]) for i in range(2)]
    now = datetime.datetime.now(datetime.UTC)
    for number, (key, subject) in enumerate(zip(keys, names, strict=True)):
        here = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(names[0])
            .public_key(key.public_key())
            .serial_number(number + 1)
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(here, critical=False)
            .add_extension(x509.BasicConstraints(ca=number == 0, path_length=None), critical=True)
            .sign(keys[0], digests.SHA256())
        )
        (folder / f"{name}{number}.pem").write_bytes(certificate.public_bytes(plain.Encoding.PEM))
    secret = keys[1].private_bytes(plain.Encoding.PEM, plain.PrivateFormat.PKCS8, plain.NoEncryption())
    (folder / f"{name}.key").write_bytes(secret)
    settings = {"TLS__CA_FILE": f"{name}0.pem"}
    for who in ("CLIENT", "WORKER", "SCHEDULER"):
        settings |= {f"TLS__{who}__CERT": f"{name}1.pem", f"TLS__{who}__KEY": f"{name}.key"}
    return {f"DASK_DISTRIBUTED__COMM__{key}": str(folder / value) for key, value in settings.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, Mapping[str, str]]]:
    """A folder with a model, a scheduler behind TLS with a worker, and the settings that lead to them."""
    folder = tmp_path_factory.mktemp("tls")
    tiny.save_llama(folder / "base", tiny.llama_weights())
    tiny.save_peft(folder / "adapter", tiny.lora_factors())
    settings = _authority(folder, "right")
    with ExitStack() as stack:

        def begin(program: str, *words: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.dask_{program}", *words, "--no-dashboard"],
                env=clean_env() | settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        file = folder / "scheduler.json"
        words = ["--host", "127.0.0.1", "--protocol", "tls", "--port", "0", "--scheduler-file", str(file)]
        process, end = begin("scheduler", *words), time.monotonic() + WAIT
        while not (file.exists() and "address" in (text := file.read_text())):
            if process.poll() is not None or time.monotonic() > end:
                pytest.fail("the scheduler did not begin")
            time.sleep(0.05)
        import json

        address = json.loads(text)["address"]
        begin("worker", address, "--no-nanny", "--nthreads", "1", "--host", "tls://127.0.0.1", "--memory-limit", "0")
        yield folder, address, settings


def _merge(folder: Path, name: str, *more: str, settings: Mapping[str, str]) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "loratools", "merge", "base", "adapter", "-q", "-o", name, *more],
        cwd=folder, env=clean_env() | settings, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_the_bytes_are_those_of_one_process(place: tuple[Path, str, Mapping[str, str]]) -> None:
    folder, address, settings = place
    assert address.startswith("tls://127.0.0.1:")
    assert _merge(folder, "one", settings={}) == (0, "")
    assert _merge(folder, "out", "--workers", address, settings=settings) == (0, "")
    assert hashes(folder / "out") == hashes(folder / "one")


@pytest.mark.parametrize("how", ["without certificates", "as tcp", "with those of another authority"])
def test_who_has_no_such_certificate_is_told_in_a_sentence(
    place: tuple[Path, str, Mapping[str, str]], how: str, tmp_path: Path
) -> None:
    folder, address, _ = place
    settings = _authority(tmp_path, "wrong") if how == "with those of another authority" else {}
    if how == "as tcp":
        address = address.replace("tls:", "tcp:")
    told = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s"}
    code, errors = _merge(folder, "never", "--workers", address, settings={**settings, **told})
    assert (code, errors.count("error: ")) == (1, 1), errors
    print(errors)
    assert "no scheduler answers" in errors
    assert "Traceback" not in errors
    assert not (folder / "never").exists()
    assert not os.path.lexists(folder / ".never.part-")
