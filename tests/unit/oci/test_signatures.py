"""Signatures: what is signed is believed for this digest under this name by these keys, and nothing else is."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uenvd.errors import ConfigError, SignatureRefused, UsageError
from uenvd.oci.signatures import (
    PAYLOAD_TYPE,
    PrivateKey,
    PublicKey,
    check_envelopes,
    envelope,
    make_keys,
    pre_authentication,
    read_keys,
    read_private_key,
    signed_name,
)

DIGEST = "sha256:" + 64 * "a"
NAME = "demo/zen3/app/1.0"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[PrivateKey, dict[str, PublicKey], Path]:
    directory = tmp_path_factory.mktemp("keys")
    key_id = make_keys(directory / "release", directory / "release.pub")
    trusted = read_keys(directory)
    assert list(trusted) == [key_id]
    assert trusted[key_id].name == "release"
    return read_private_key(directory / "release"), trusted, directory


Keys = tuple[PrivateKey, dict[str, PublicKey], Path]


def test_a_good_signature_is_believed(keys: Keys) -> None:
    private, trusted, _directory = keys
    raw = envelope(private, NAME, DIGEST)
    assert raw == envelope(private, NAME, DIGEST)
    assert check_envelopes([b"junk", raw], trusted, NAME, DIGEST).name == "release"


def test_every_reason_to_refuse_has_its_words(keys: Keys, tmp_path: Path) -> None:
    private, trusted, _directory = keys
    raw = envelope(private, NAME, DIGEST)
    make_keys(tmp_path / "k", tmp_path / "k.pub")
    foreign = envelope(read_private_key(tmp_path / "k"), NAME, DIGEST)
    body = json.loads(raw)
    forged = json.loads(raw)
    forged["payload"] = base64.b64encode(b'{"digest":"x"}').decode()
    for raws, name, digest, said in (
        ([], NAME, DIGEST, "is not signed"),
        ([raw], NAME, "sha256:" + 64 * "b", "another image"),
        ([raw], "demo/zen3/other/1.0", DIGEST, "is for demo/zen3/app/1.0, not demo/zen3/other/1.0"),
        ([foreign], NAME, DIGEST, "an unknown key"),
        ([json.dumps(forged).encode()], NAME, DIGEST, "forged or damaged"),
        ([json.dumps({**body, "payloadType": "text/plain"}).encode()], NAME, DIGEST, "signs something else"),
        ([json.dumps({**body, "signatures": []}).encode()], NAME, DIGEST, "by nobody"),
        ([b"{}", b"[]", b"\xff", b"[" * 100_000], NAME, DIGEST, "malformed"),
    ):
        with pytest.raises(SignatureRefused) as caught:
            check_envelopes(raws, trusted, name, digest)
        assert said in caught.value.message
    with pytest.raises(SignatureRefused, match="unknown key"):
        check_envelopes([raw], {}, NAME, DIGEST)


def test_a_tag_that_was_not_signed(keys: Keys) -> None:
    """An old release under a newer tag is refused; a signature that says nothing of tags holds for all, unless the site asks for more."""
    private, trusted, _directory = keys
    bound, plain = envelope(private, NAME, DIGEST, ["v2", "v1"]), envelope(private, NAME, DIGEST)
    assert bound == envelope(private, NAME, DIGEST, ["v1", "v2", "v1"]) != plain

    def believed(raws: list[bytes], tag: str | None, *, needed: bool = False) -> str:
        try:
            return check_envelopes(raws, trusted, NAME, DIGEST, tag, tag_needed=needed).name
        except SignatureRefused as error:
            assert tag is None or f"--tag {tag}" in (error.hint or "")
            return error.message

    for needed in (False, True):
        assert believed([bound], "v1", needed=needed) == believed([bound], "v2", needed=needed) == "release"
        assert believed([bound], None, needed=needed) == believed([plain], None, needed=needed) == "release"
        assert "is for the tag v1, v2, not v3" in believed([bound], "v3", needed=needed)
    assert believed([plain], "v3") == believed([bound, plain], "v3") == "release"
    assert "does not say that it is for the tag v3" in believed([plain], "v3", needed=True)
    # What else "tags" may be is no list of tags: signed or not, it allows none.
    for value in ("v3", {"v3": 1}, 3, [], [["v3"]]):
        raw = envelope_of(private, {"image": NAME, "digest": DIGEST, "version": 1, "tags": value})
        assert "not v3" in believed([raw], "v3")


def envelope_of(key: PrivateKey, body: object) -> bytes:
    """Sign any payload."""
    payload = json.dumps(body).encode()
    signature = key.key.sign(pre_authentication(PAYLOAD_TYPE, payload))
    signatures = [{"keyid": key.key_id, "sig": base64.b64encode(signature).decode()}]
    document = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": signatures,
    }
    return json.dumps(document).encode()


@given(
    st.binary(max_size=300), st.integers(min_value=0, max_value=400), st.integers(min_value=1, max_value=255)
)
def test_no_bytes_and_no_changed_byte_are_believed(keys: Keys, junk: bytes, place: int, change: int) -> None:
    private, trusted, _directory = keys
    raw = bytearray(envelope(private, NAME, DIGEST))
    with pytest.raises(SignatureRefused):
        check_envelopes([junk], trusted, NAME, DIGEST)
    raw[place % len(raw)] ^= change
    try:
        good = check_envelopes([bytes(raw)], trusted, NAME, DIGEST)
    except SignatureRefused:
        return
    # JSON has more than one way to write the same.
    assert good.name == "release"
    assert base64.b64decode(json.loads(bytes(raw))["payload"]) == base64.b64decode(
        json.loads(envelope(private, NAME, DIGEST))["payload"]
    )


def test_openssl_agrees(keys: Keys, tmp_path: Path) -> None:
    """An independent implementation checks what we sign."""
    private, _trusted, directory = keys
    assert shutil.which("openssl")
    body = json.loads(envelope(private, NAME, DIGEST))
    (tmp_path / "message").write_bytes(pre_authentication(PAYLOAD_TYPE, base64.b64decode(body["payload"])))
    (tmp_path / "signature").write_bytes(base64.b64decode(body["signatures"][0]["sig"]))
    done = subprocess.run(
        ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", directory / "release.pub", "-in", tmp_path / "message",
         "-sigfile", tmp_path / "signature"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_key_files(tmp_path: Path) -> None:
    make_keys(tmp_path / "k", tmp_path / "k.pub")
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    with pytest.raises(UsageError, match="exists already"):
        make_keys(tmp_path / "k", tmp_path / "other.pub")
    with pytest.raises(UsageError, match="exists already"):
        make_keys(tmp_path / "new", tmp_path / "k.pub")
    assert not (tmp_path / "new").exists()
    (tmp_path / "k").chmod(0o640)
    with pytest.raises(UsageError, match="may be read by others"):
        read_private_key(tmp_path / "k")
    (tmp_path / "k").chmod(0o600)
    with pytest.raises(UsageError, match="cannot be read"):
        read_private_key(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "text").chmod(0o600)
    with pytest.raises(UsageError, match="holds no private key"):
        read_private_key(tmp_path / "text")
    subprocess.run(["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", tmp_path / "ec"],
                   check=True, capture_output=True)  # fmt: skip
    os.chmod(tmp_path / "ec", 0o600)
    with pytest.raises(UsageError, match="is not one of Ed25519"):
        read_private_key(tmp_path / "ec")
    (tmp_path / "bad.pub").write_text("hello")
    with pytest.raises(ConfigError, match=r"bad\.pub holds no public key"):
        read_keys(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_the_name_leaves_the_namespace_out() -> None:
    assert signed_name("build/demo/zen3/app/1.0") == signed_name("deploy/demo/zen3/app/1.0") == NAME
    with pytest.raises(UsageError):
        signed_name("deploy/demo/index")
