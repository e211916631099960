import pytest

from uenvd.errors import LabelError, UsageError
from uenvd.publish.push import Target, target_of

DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("label", "namespace", "repository"),
    [
        ("app/1.0:v1@demo%zen3", None, "deploy/demo/zen3/app/1.0"),
        ("app/1.0:v1@demo%zen3", "build", "build/demo/zen3/app/1.0"),
        ("build::app/1.0:v1@demo%zen3", None, "build/demo/zen3/app/1.0"),
        ("build::app/1.0:v1@demo%zen3", "build", "build/demo/zen3/app/1.0"),
    ],
)
def test_labels_lead_to_repositories(label: str, namespace: str | None, repository: str) -> None:
    assert target_of(label, namespace) == Target(repository, "v1")


def test_a_digest_stands_for_a_tag_where_it_may() -> None:
    label = f"app/1.0@demo%zen3@{DIGEST}"
    assert target_of(label, None, digest_allowed=True) == Target("deploy/demo/zen3/app/1.0", DIGEST)
    with pytest.raises(UsageError):
        target_of(label, None)


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("app", "version, tag, system, uarch"),
        ("app/1.0@demo%zen3", "tag"),
        ("app/1.0:v1%zen3", "system"),
        ("app/1.0:v1@*%zen3", "which system"),
        ("/1.0:v1@demo%zen3", "name"),
        (f"app/1.0:sha256-{'0' * 64}@demo%zen3", "no valid tag"),
        (f"app/1.0:{'a' * 129}@demo%zen3", "no valid tag"),
    ],
)
def test_what_is_missing_is_said(label: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        target_of(label, None)
    assert caught.value.hint


def test_two_namespaces_are_refused() -> None:
    with pytest.raises(UsageError, match="namespace"):
        target_of("build::app/1.0:v1@demo%zen3", "deploy")


@pytest.mark.parametrize("label", ["App/1.0:v1@demo%zen3", "app/1.0:v1@Demo%zen3", "app/1..0:v1@demo%zen3"])
def test_what_no_registry_holds_is_refused(label: str) -> None:
    with pytest.raises(LabelError, match="cannot be part"):
        target_of(label, None)
