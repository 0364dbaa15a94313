"""Passwords, tokens and keys reach neither messages nor logs nor MLflow, in whatever form they come."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import ROOT, write_params
from moco.doctor.checks import warn
from moco.errors import UserError
from moco.redaction import literal_secret, redact, redact_tree
from moco.settings.listing import params_text
from moco.settings.reading import load
from moco.tracking import lineage, origin
from moco.tracking.metric_log import MetricLog
from moco.tracking.store import explain

SECRET = "S3cretS3cret"
KEY = "AKIAS3CRETS3CRETS3CR"
FORMS = [
    f"mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BODBC%7D%3BSERVER%3Dh%3BUID%3Dsa%3BPWD%3D{SECRET}%3B",
    f"mssql+pyodbc:///?odbc_connect=DRIVER=x;UID=sa;PWD={SECRET}", f"mysql://h/db?PWD={SECRET}&x=1",
    f"mysql://h/db?passwd={SECRET}", f"postgresql://h/db?user=u&password={SECRET}&x=1", f"http://h/x?token={SECRET}",
    f"http://u:{SECRET}@h:5000", f"http://u:{SECRET}/w@h", f"http://u:{SECRET}@w@h says no", f"http://{SECRET}@h/x",
    f"postgresql%3A%2F%2Fu%3A{SECRET}%40h", f"password%3D{SECRET}%26x", f"pwd%253D{SECRET}%253B",
    f"DRIVER={{x}};UID=sa;PWD=two {SECRET} words;SERVER=h", f"DRIVER={{x}};PWD={{a;{SECRET}}};SERVER=h",
    f"password: {SECRET}", f'{{"password": "a {SECRET} b"}}', f"{{'db_password': '{SECRET}'}}",
    f"AWS_SECRET_ACCESS_KEY={SECRET}", f"aws_access_key_id: {KEY}", f"key {KEY} is not known", f"AccountKey={SECRET};x",
    f"https://b/o?X-Amz-Signature={SECRET}&y=1", f"https://b/o?sv=1&sig={SECRET}&se=1", f"api_key={SECRET}",
    f"Authorization: Basic {SECRET}==", f"Authorization: Bearer {SECRET}", f"{{'Authorization': 'Basic {SECRET}='}}",
    f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----",
]  # fmt: skip
LONG = f"{SECRET}{SECRET}{SECRET}"
# As they are written into Python sources; those of the second list are secrets in messages and settings as well.
IN_SOURCES = [
    f'PASSWORD = "{SECRET}"', f'store = "postgresql://u:{SECRET}@h/d"', f"use({KEY!r})", f'pw = "{SECRET}"',
    f'password: str = "{SECRET}"', f'secret_key = b"{SECRET}"', f'token = ("{SECRET}")',
    f'PASSWORD = "a {SECRET} b"', f'os.environ["X_TOKEN"] = "{SECRET}"', f'os.getenv("X_TOKEN", "{SECRET}")',
    f'headers["X-Api-Key"] = "{SECRET}"', f'session.login("me", "{SECRET}")', f'wandb.login(key="{LONG}")',
    f'add("--password", default="{SECRET}")', f'keyring.set_password("s", "u", "{SECRET}")', f'jwt = "{SECRET}"',
    f'requests.get(url, auth=("user", "{SECRET}"))',
]  # fmt: skip
BY_FORM = [
    f'HTTPBasicAuth("user", "{SECRET}")', f'auth=("user", "{SECRET}")', f"xoxb-123456789012-{SECRET}",
    f"AIza{SECRET}{SECRET}{SECRET}"[:39], f"ghp_{LONG}", f"github_pat_{LONG}", f"hf_{LONG}", f"glpat-{LONG}",
    f"sk-proj-{LONG}", f"sk_live_{LONG}", f"npm_{LONG}", f"pypi-AgEI{LONG}", f"123456789:AA{LONG}",
    f"https://hooks.slack.com/services/T0/B0/{SECRET}", f"https://discord.com/api/webhooks/12345/{SECRET}",
    f"https://x.webhook.office.com/webhookb2/{SECRET}@{SECRET}/IncomingWebhook/{SECRET}", f"curl -u user:{SECRET} url",
    f'["curl", "--user", "user:{SECRET}"]', f"tool --password {SECRET} x", f'["--password", "{SECRET}"]',
    f"tool --token={SECRET}", f"mysql -u root -p{SECRET} db", f"sshpass -p {SECRET} ssh", f"docker login -p {SECRET}",
    f"Basic {SECRET}==", f"Bearer {SECRET}", f'{{"Authorization": "Basic {SECRET}="}}',
    f"eyJhbGciOiJI.eyJzdWIiOiIx.{SECRET}", f"export PGPASSWORD={SECRET}", f'"https://b/o?sv=1&sig={SECRET}"',
    f'"Driver=x;UID=u;PWD={SECRET}"',
]  # fmt: skip
FORMS += [*BY_FORM, f"jwt={SECRET}"]
HARMLESS = [
    "sqlite:////home/u@x/mlflow.db: cannot be opened", "models:/moco-classifier@champion", "http://host:5000/x?y=1",
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD", "params.yaml, line 3: unknown key 'token'",
    "pretrain.key_momentum=0.999", "git@github.com:a/b", "3 passes: 12 min", "design=3", "runs/train/KEY-2",
    "/data/run_sig=3/x", "sig=3/x", "/data/token=5/x: not there", "/data/signature=a/pass=2", "tokens: 7",
    "max_tokens=7", "tokenizer: bpe", "key=lr", "s3://bucket/a@b/c", "//nas/a@b/c", "/data//u@v", "https://host:5000/a@b",
    "/data/password_images", "secret_santa/images", "Basic research", "/data/bearer images/long", "signature: none",
    "hf_datasets_imagenet_1k_resized", "/data/sk-images-of-all-kinds-2024", "--password is asked for, --token tells",
]  # fmt: skip


def assert_hidden(text: str) -> None:
    assert SECRET not in text and KEY not in text, text


@pytest.mark.fault("secrets", len(FORMS))
@pytest.mark.parametrize("form", FORMS)
def test_no_output_shows_a_secret(form: str, tmp_path: Path, project: Path) -> None:
    """The log's params and tags are what MLflow gets; stderr shows UserErrors, warnings and doctor's findings."""
    assert_hidden(redact(form))
    assert_hidden(str(UserError(f"tracking.uri: '{form}' is not known", "")))
    assert_hidden(explain(RuntimeError(f"cannot read {form}"), form))
    assert_hidden(warn("mlflow", form, form).line())
    log = MetricLog(tmp_path / "run/metrics.jsonl")
    log.write("start", stage="s", name="n", params={"a": form, "b": [form]}, tags={"image": form}, dataset={"s": form})
    log.close()
    assert_hidden(log.path.read_text())
    write_params(project, tracking__uri=form, data__path=form)
    assert_hidden(params_text(load(project / "params.yaml")))


def test_what_is_no_secret_stays_as_it_is() -> None:
    for text in HARMLESS:
        assert redact(text) == text
    tree = {"pretrain.lr": 0.1, "token": SECRET, "deep": [{"password": SECRET, "user": "u"}], "tokens": 7}
    assert redact_tree(tree) == {
        "pretrain.lr": 0.1, "token": "...", "deep": [{"password": "...", "user": "u"}], "tokens": 7,
    }  # fmt: skip


@pytest.mark.fault("secrets")
def test_secrets_that_are_no_text_are_hidden_by_their_key() -> None:
    tree = {"password": 123456, "token": ["a", SECRET], "credentials": {"user": "u", "pin": 1}, "x.secret": 0.5}
    assert redact_tree(tree) == dict.fromkeys(tree, "...")
    empty = {"password": None, "token": "", "secret": [], "api_key": True}
    assert redact_tree(empty) == empty


def test_no_setting_of_a_preset_is_changed_in_the_record(project: Path) -> None:
    presets = sorted((ROOT / "presets").glob("*.yaml"))
    assert len(presets) > 3
    for path in presets:
        tree = yaml.safe_load(path.read_text())
        assert redact_tree(tree) == tree, path
    write_params(project, data__path="/data/run_sig=3/token=5/x@y", data__mounted="/mnt//a@b")
    for config in (load(ROOT / "params.yaml"), load(project / "params.yaml")):
        assert yaml.safe_load(params_text(config)) == json.loads(json.dumps(asdict(config)))


def test_no_line_of_this_project_counts_as_a_secret() -> None:
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "src").rglob("*.html"), ROOT / "dvc.yaml", ROOT / "pyproject.toml"]
    found = [f"{path}: {line}" for path in files for line in path.read_text(encoding="utf-8").splitlines()
             if literal_secret(line, path.name)]  # fmt: skip
    assert not found and len(files) > 100


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(project: Path) -> Path:
    """A project under git, whose remote's password DVC wrote into .dvc/config, with secrets lying about."""
    for name in (".dvc", "src/moco", "labels"):
        (project / name).mkdir(parents=True)
    for name in (".dvc/config", "src/moco/used.py", "dvc.yaml", "notes.txt", "src/settings.ini"):
        (project / name).write_text("first = 1\n")
    git(project, "init", "-q")
    git(project, "add", "-A", ":!dataset")
    git(project, "commit", "-q", "-m", "one")
    (project / ".dvc/config").write_text(f"['remote \"store\"']\n    password = {SECRET}\n")
    for name in ("notes.txt", "src/settings.ini", "src/.env", "src/id_rsa", "untracked.txt"):
        (project / name).write_text(f"{SECRET}\n")
    (project / "src/moco/used.py").write_text("first = 2  # ours\n")
    (project / "src/moco/fresh.py").write_text("token = token.strip()\n")
    (project / "dvc.yaml").write_text("stages: {}\n")
    return project


def recorded(project: Path) -> Any:
    from moco.data.manifest import Manifest

    write_params(project, tracking__uri=f"http://u:{SECRET}@127.0.0.1:9")
    manifest = Manifest({"name": "n"}, {}, 4, 4, None, ["a"], (0.0,) * 3, (1.0,) * 3, {}, 0)  # type: ignore[arg-type]
    return origin.origin(load(project / "params.yaml"), manifest, torch.device("cpu"))


@pytest.mark.fault("secrets")
def test_the_patch_holds_sources_alone(repository: Path) -> None:
    found = recorded(repository)
    patch = found.files["changes.patch"].decode()
    assert "+first = 2  # ours" in patch and "+token = token.strip()" in patch and "+stages: {}" in patch
    for name in ("config", "settings.ini", ".env", "id_rsa", "notes.txt", "untracked.txt"):
        assert name not in patch, name
    assert_hidden(json.dumps([found.tags, found.dataset, found.pipeline]))
    for content in found.files.values():
        assert_hidden(content.decode())
    assert yaml.safe_load(found.files["params.yaml"])["tracking"]["uri"] == "http://127.0.0.1:9"


@pytest.mark.fault("secrets", len(IN_SOURCES) + len(BY_FORM))
def test_secrets_in_sources_are_recognized() -> None:
    for line in (*IN_SOURCES, *(f"run({form!r})" for form in BY_FORM)):
        assert literal_secret(line), line
    for line in (f"    password: {SECRET}", f"  cmd: tool --password {SECRET}", f"jwt={SECRET}"):
        assert literal_secret(line, "dvc.yaml"), line
    for line in ("token = token.strip()", 'password = os.environ["PASSWORD"]', 'f(auth=("user", password))',
                 'token: str = ""', 'TOKEN = "MLFLOW_TRACKING_TOKEN"', 'help="--password is asked for"',
                 'url = f"http://{user}:{password}@host"', '["--password", "--token"]', "git@github.com"):  # fmt: skip
        assert not literal_secret(line), line


PEM = f'KEY = (\n"""\n-----BEGIN OPENSSH PRIVATE KEY-----\n{SECRET}\n"""\n)\n'
SPREAD = f'requests.get(\n    url, auth=(\n        "user",\n        "{SECRET}",\n    )\n)\n'


@pytest.mark.fault("secrets", 5)
@pytest.mark.parametrize(
    ("before", "after", "place"),
    [
        ("first = 1\n", f'first = 2\nPASSWORD = "{SECRET}"\n', "used.py, line 2"),
        ("first = 1\n", SPREAD, "used.py, line 4"),
        ("first = 1\n", PEM, "used.py, line 3"),
        (f'PASSWORD = "{SECRET}"\n', "first = 1\n", "used.py, line 1, as it was"),  # removed lines are in it, too
        (f'PASSWORD = "{SECRET}"\nfirst = 1\n', f'PASSWORD = "{SECRET}"\nfirst = 2\n', "used.py, line 1"),
    ],
)
def test_a_patch_with_a_secret_in_it_is_not_recorded_and_this_is_told(
    repository: Path, before: str, after: str, place: str
) -> None:
    source = repository / "src/moco/used.py"
    source.write_text(before + "last = 1\n")
    git(repository, "add", "src/moco/used.py")
    git(repository, "commit", "-q", "-m", "two")
    source.write_text(after + "last = 1\n")
    found = recorded(repository)
    assert "changes.patch" not in found.files
    assert place in found.tags["patch_left_out"] and place in found.warning
    assert_hidden(json.dumps(found.tags) + found.warning)


@pytest.mark.fault("secrets", 2)
def test_restoring_says_what_the_record_lacks(repository: Path) -> None:
    found = recorded(repository)
    assert found.tags["params_redacted"] == "tracking.uri"
    kept = {"params.yaml": str(repository / "kept.yaml")}
    Path(kept["params.yaml"]).write_bytes(found.files["params.yaml"])
    git(repository, "commit", "-q", "-a", "-m", "three")
    said: list[str] = []
    lineage._restore(found.tags, kept, lambda _: True, said.append)
    assert any("tracking.uri" in line and "secret" in line for line in said), said
    with pytest.raises(UserError) as refused:
        lineage._restore({**found.tags, "patch_left_out": "x.py, line 2 ..."}, kept, lambda _: True, said.append)
    assert refused.value.code == "E-ORIGIN-PATCH-LEFT-OUT" and "x.py, line 2" in str(refused.value)


@pytest.mark.fault("secrets", 3)
@pytest.mark.parametrize(
    "text",
    [
        "Basic ImageNet",
        "docker login; docker run -p 8080:80 image",
        "docker login && ssh -p 2222 host",
    ],
)
def test_honest_texts_stay_as_they_are(text: str) -> None:
    assert redact(text) == text


@pytest.mark.fault("secrets")
def test_long_lines_are_looked_through_in_no_time() -> None:
    """A pattern of nested repetitions once took half a minute for 13 kB."""
    line = "docker " * 500 + "login " * 500 + "curl " * 500 + "x" * 5000
    began = time.process_time()
    redact(line)
    literal_secret(line)
    assert time.process_time() - began < 5
