import pytest

from uenvd.errors import ConfigError, LabelError, RegistryError
from uenvd.oci.reference import (
    attachment_tag,
    attachments_of,
    check_reference,
    fallback_tag,
    is_fallback_tag,
    is_repository,
    is_tag,
    own_digits,
    parse_registry,
    repository_of,
    split_repository,
)


@pytest.mark.parametrize(
    ("text", "shown", "base", "prefix"),
    [
        ("https://r.example.org", "https://r.example.org", "https://r.example.org", ""),
        ("r.example.org/a/b", "https://r.example.org/a/b", "https://r.example.org", "a/b"),
        ("R.Example.org:5000/", "https://r.example.org:5000", "https://r.example.org:5000", ""),
        ("http://127.0.0.1:5000/x/", "http://127.0.0.1:5000/x", "http://127.0.0.1:5000", "x"),
        ("http://[::1]:80", "http://[::1]", "http://[::1]", ""),
        ("https://r.example.org:443/x", "https://r.example.org/x", "https://r.example.org", "x"),
        ("localhost/x", "https://localhost/x", "https://localhost", "x"),
    ],
)
def test_addresses_of_servers(text: str, shown: str, base: str, prefix: str) -> None:
    address = parse_registry(text)
    assert (address.kind, str(address), address.base_url, address.prefix) == ("http", shown, base, prefix)
    assert parse_registry(shown) == address


def test_address_of_a_layout() -> None:
    address = parse_registry("oci-layout:/srv/images")
    assert (address.kind, address.path, str(address)) == ("layout", "/srv/images", "oci-layout:/srv/images")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "oci-layout:",
        "ftp://host",
        "https://",
        "https:///x",
        "https://host:0",
        "https://host:99999",
        "https://host:port",
        "https://host/Upper",
        "https://host/a//b",
        "https://ho st",
        "https://-host",
        "https://[::1",
        "https://host/a?b",
    ],
)
def test_wrong_addresses_say_what_to_write(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_registry(text)
    assert caught.value.hint


def test_a_password_in_the_address_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_registry("https://alice:s3cret@host/x")
    assert "s3cret" not in str(caught.value) + caught.value.hint


def test_repositories_are_built_and_taken_apart() -> None:
    name = repository_of("deploy", "daint", "gh200", "prgenv-gnu", "24.11")
    assert name == "deploy/daint/gh200/prgenv-gnu/24.11"
    assert split_repository(name) == ("deploy", "daint", "gh200", "prgenv-gnu", "24.11")
    assert split_repository("deploy/daint") is None
    assert split_repository("deploy/daint/gh200/Upper/1") is None


@pytest.mark.parametrize("part", ["Upper", "", "a/b", "a..b", "-a", "a-", "a+b", "ä", "a___b"])
def test_parts_that_no_registry_holds_are_refused(part: str) -> None:
    with pytest.raises(LabelError):
        repository_of("deploy", "daint", "gh200", part, "1")


def test_a_repository_name_that_is_too_long_is_refused() -> None:
    with pytest.raises(LabelError):
        repository_of("deploy", "daint", "gh200", "a" * 250, "1")


def test_grammar() -> None:
    assert is_repository("a/b__c/d-e.f") and not is_repository("a/") and not is_repository("a" * 256)
    assert is_tag("v1.0_A-b") and not is_tag(".a") and not is_tag("a" * 129) and not is_tag("a\n")
    digest = "sha256:" + "0" * 64
    assert fallback_tag(digest) == "sha256-" + "0" * 64 and is_fallback_tag(fallback_tag(digest))
    assert not is_fallback_tag("sha256-12")
    check_reference("a/b", digest)
    for repository, reference in [("A", "v1"), ("a", "sha256:12"), ("a", "../x"), ("../a", "v1")]:
        with pytest.raises(RegistryError):
            check_reference(repository, reference)


def test_tags_of_attachments_are_no_tags_of_images() -> None:
    subject, mine = "sha256:" + "a" * 64, "sha256:" + "b1" * 32
    tag = attachment_tag(subject, mine)
    assert is_tag(tag) and is_fallback_tag(tag) and tag.startswith(fallback_tag(subject))
    others = [
        attachment_tag("sha256:" + "c" * 64, mine),
        fallback_tag(subject),
        f"{fallback_tag(subject)}.sig",
        "v1",
    ]
    assert attachments_of(subject, [tag, *others]) == {own_digits(mine): tag}
    assert not is_fallback_tag("v1") and not is_fallback_tag("sha256-" + "a" * 63)
