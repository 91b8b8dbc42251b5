"""Keys and the policy: who is who, and that nothing odd is followed."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("pydantic")

from libortho.cli import app
from libortho.serve.keys import LONGEST, digest, match, mint, toml_entry
from libortho.serve.policy import Policy, PolicyError, append_entry, parse_policy, read_policy

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_a_key_is_random_and_only_its_digest_is_kept() -> None:
    one, two = mint(), mint()
    assert one.secret != two.secret
    assert len(one.secret) > 40
    assert one.sha256 == hashlib.sha256(one.secret.encode()).hexdigest()
    assert one.secret not in toml_entry("a", one, 1.0, 5)


def test_match_finds_the_key_and_compares_all_in_constant_time(monkeypatch) -> None:
    import libortho.serve.keys as module

    digests = [digest(f"lo-{i}") for i in range(4)]
    compared: list[str] = []
    real = module.hmac.compare_digest

    def compare(a: str, b: str) -> bool:
        compared.append(b)
        return real(a, b)

    monkeypatch.setattr(module.hmac, "compare_digest", compare)
    assert match("lo-1", digests) == 1
    assert compared == digests, "it must not stop at the one that it found"
    assert match("lo-9", digests) is None
    assert match("lo-\ud800", digests) is None
    assert match("x" * (LONGEST + 1), [digest("x" * (LONGEST + 1))]) is None


def policy_with(more: str = "", **values: object) -> str:
    lines = {"id": '"clinic"', "sha256": f'"{digest("lo-k")}"', "max_alpha": "0.5", **values}
    return "version = 1\n" + more + "[[keys]]\n" + "\n".join(f"{k} = {v}" for k, v in lines.items())


@pytest.mark.parametrize("mode", [0o640, 0o644, 0o600])
def test_a_policy_file_stays_what_it_was(tmp_path: Path, mode: int) -> None:
    kept, link = tmp_path / "kept" / "policy.toml", tmp_path / "policy.toml"
    kept.parent.mkdir()
    kept.write_text(policy_with())
    kept.chmod(mode)
    link.symlink_to(kept)
    append_entry(link, toml_entry("a", mint(), 1.0, 5))
    assert link.is_symlink()
    assert [rule.id for rule in read_policy(kept).keys] == ["clinic", "a"]
    assert stat.S_IMODE(kept.stat().st_mode) == mode
    assert [p.name for p in kept.parent.iterdir()] == ["policy.toml"]


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="only root may chown")
def test_a_policy_file_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(policy_with())
    os.chown(path, 1234, 2345)
    append_entry(path, toml_entry("a", mint(), 1.0, 5))
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)


def test_a_new_policy_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "policy.toml"
    append_entry(path, toml_entry("a", mint(), 1.0, 5))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_keys_that_are_made_at_once_are_all_kept(tmp_path: Path, monkeypatch) -> None:
    import libortho.serve.policy as module

    path = tmp_path / "policy.toml"

    def slowly(text: str) -> Policy:
        time.sleep(0.02)  # between reading and writing
        return parse_policy(text)

    monkeypatch.setattr(module, "parse_policy", slowly)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append_entry(path, toml_entry(f"k{i}", mint(), 1.0, 5)), range(8)))
    monkeypatch.undo()
    assert {rule.id for rule in read_policy(path).keys} == {f"k{i}" for i in range(8)}


def test_who_is_who() -> None:
    policy = parse_policy(policy_with(expires="2026-06-01T00:00:00Z"))
    known = policy.principal("lo-k", NOW)
    assert known is not None
    assert (known.id, known.max_alpha, known.requests_per_minute) == ("clinic", 0.5, 60)
    for stranger in (None, "", "lo-x", digest("lo-k")):
        anonymous = policy.principal(stranger, NOW)
        assert anonymous is not None
        assert (anonymous.id, anonymous.max_alpha) == ("anonymous", 0.0)
    late = policy.principal("lo-k", datetime(2027, 1, 1, tzinfo=UTC))
    assert late is not None
    assert late.id == "anonymous"


def test_without_key_refuse() -> None:
    policy = parse_policy(policy_with('without_key = "refuse"\n'))
    assert policy.principal(None) is None
    assert policy.principal("lo-x") is None
    assert policy.principal("lo-k") is not None


def test_the_default_policy_gives_alpha_0_to_everyone() -> None:
    principal = Policy().principal("lo-k")
    assert principal is not None
    assert principal.max_alpha == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("version = 2", "version: Input should be 1"),
        ("", "version: Field required"),
        ("version = 1\nmax_alpha = 1", "max_alpha: Extra inputs are not permitted"),
        ('version = 1\nwithout_key = "alpha-1"', "without_key: Input should be 'alpha-0' or 'refu"),
        ("version = ", "not TOML"),
        ("version = " + "9" * 5000, "not TOML"),
        ("version = " + "[" * 20_000, "not TOML"),
        (policy_with(requests_per_minute="9" * 400), "requests_per_minute: Input should be less"),
        (policy_with(max_alpha="1.5"), "keys.0.max_alpha: Input should be less than or equal to 1"),
        (policy_with(max_alpha="nan"), "keys.0.max_alpha: Input should be a finite number"),
        (policy_with(max_alpha='"1"'), "keys.0.max_alpha: Input should be a valid number"),
        (policy_with(max_alpha="true"), "keys.0.max_alpha: Input should be a valid number"),
        (policy_with(sha256='"lo-secret"'), "keys.0.sha256: String should match pattern"),
        (policy_with(id='"a b"'), "keys.0.id: Value error, key id 'a b': expected 1 to 64"),
        (policy_with(id='"anonymous"'), "is what callers without a key are called"),
        (policy_with(expires="2030-01-01T00:00:00"), "expected a time zone"),
        (policy_with(requests_per_minute="0"), "requests_per_minute: Input should be greater"),
        (policy_with() + "\n" + policy_with().split("\n", 1)[1], "keys.1.id: 'clinic' is there tw"),
    ],
)
def test_a_policy_that_is_not_understood_is_refused(text: str, told: str) -> None:
    with pytest.raises(PolicyError) as error:
        parse_policy(text)
    assert told in str(error.value)
    assert "lo-secret" not in str(error.value), "a value may be a key in the wrong place"


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_bytes(b"\xff")
    with pytest.raises(PolicyError, match=r"p\.toml: not UTF-8"):
        read_policy(path)
    path.write_text("nonsense = 1")
    with pytest.raises(PolicyError, match=r"p\.toml: "):
        append_entry(path, toml_entry("a", mint(), 1.0, 5))
    assert path.read_text() == "nonsense = 1"


def test_keys_new_makes_a_policy_that_knows_the_key(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"

    def new(*arguments: str):
        return CliRunner().invoke(app, ["keys", "new", *arguments])

    made = new("--id", "clinic", "--max-alpha", "0.5", "--rate", "7", "--policy", str(path))
    assert made.exit_code == 0, made.output
    secret = next(x.split()[1] for x in made.output.splitlines() if x.startswith("key "))
    assert secret not in path.read_text()
    principal = read_policy(path).principal(secret)
    assert principal is not None
    assert (principal.id, principal.max_alpha, principal.requests_per_minute) == ("clinic", 0.5, 7)
    more = new("--id", "ward", "--expires", "2999-01-01T01:00:00+01:00", "--policy", str(path))
    assert more.exit_code == 0, more.output
    assert [rule.id for rule in read_policy(path).keys] == ["clinic", "ward"]
    assert read_policy(path).keys[1].expires == datetime(2999, 1, 1, tzinfo=UTC)
    before = path.read_text()
    for wrong, told in (
        (("--id", "clinic"), "'clinic' is there twice"),
        (("--id", "b", "--max-alpha", "2"), "max_alpha=2.0: expected"),
        (("--id", "b", "--expires", "tomorrow"), "expires='tomorrow': expected a time and its"),
        (("--id", "b", "--expires", "2999-01-01"), "expires='2999-01-01': expected a time and its"),
        (("--id", "b", "--expires", "2999-01-01T00:00:00"), "its zone, such as 2030-01-01T00:00:"),
        (("--id", "b", "--expires", "2020-01-01T00:00:00Z"), "expires='2020-01-01T00:00:00Z' is"),
        (("--id", "b c"), "key id 'b c': expected"),
    ):
        refused = new(*wrong, "--policy", str(path))
        assert refused.exit_code == 2, refused.output
        assert told in refused.output
        assert "Traceback" not in refused.output
    assert path.read_text() == before
    shown = new("--id", "shown")
    assert "[[keys]]" in shown.output
    assert "key   lo-" in shown.output
