"""Programs and patches of others do not run, or change anything, before somebody has agreed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import Moco, assert_one_line_error
from moco.data.manifest import load_manifest
from moco.encoders.architecture import Architecture
from moco.errors import UserError
from moco.exchange.known_submission import is_known
from moco.exchange.submission import render
from moco.settings.eval import EvalConfig
from moco.tracking.lineage import _restore, _show_patch

NETWORKS = [
    Architecture("small_resnet", "small", 4, 3, "pyramid"), Architecture("small_resnet", "imagenet", 8, 2, "last", 1),
    Architecture("resnet18", "small", 1, 1), Architecture("wide_resnet50_2", "imagenet", 1, 1),
]  # fmt: skip
CHANGES = [
    ("class_names = ", "class_names = __import__('os').system('true') or "),
    ("team_id = ", "team_id = 1 and "),
    ("transforms.ToTensor()", "transforms.ToTensor(), print"),
    ("def get_model", "import os\n\n\ndef get_model"),
    ("num_classes=", "num_classes=1 + "),
]


@pytest.mark.fault("strange-code")
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: f"{network.name}-{network.stem}")
def test_what_this_project_writes_is_known_and_any_change_is_not(
    moco: Moco, project: Path, network: Architecture
) -> None:
    assert moco("data").returncode == 0
    config = EvalConfig(team_id=7, team_name="a 'team'", email_address="a@b")
    text = render(network, load_manifest(project / "models/manifest.json"), config)
    path = project / "submission.py"
    path.write_text(text)
    assert is_known(path)
    for old, new in CHANGES:
        if old in text:
            path.write_text(text.replace(old, new, 1))
            assert not is_known(path), new


@pytest.mark.fault("strange-code")
def test_a_strangers_submission_runs_only_with_a_yes(moco: Moco, project: Path) -> None:
    for stage in ("data", "pretrain", "train"):
        assert moco(stage).returncode == 0
    shutil.copytree("models/classifier", "theirs")
    assert moco("eval", "--classifier", "theirs").returncode == 0, "a copy of our own is known"
    script = project / "theirs/submission.py"
    script.write_text(script.read_text() + f"\n__import__('pathlib').Path({str(project / 'ran')!r}).touch()\n")
    done = moco("eval", "--classifier", "theirs")
    assert_one_line_error(done, "theirs/submission.py", "--yes", "E-EVAL-UNKNOWN-CODE")
    assert not (project / "ran").exists()
    assert moco("eval", "--classifier", "theirs", "--yes").returncode == 0
    assert (project / "ran").exists()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One commit, of a file `code.py`, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    (tmp_path / "code.py").write_text("one\n")
    for words in (["init", "-q"], ["config", "user.name", "t"], ["config", "user.email", "t@example.org"],
                  ["add", "code.py"], ["commit", "-q", "-m", "x"]):  # fmt: skip
        subprocess.run(["git", *words], check=True)
    return tmp_path


GOOD = "diff --git a/code.py b/code.py\n--- a/code.py\n+++ b/code.py\n@@ -1 +1 @@\n-one\n+two\n"
NEW = "diff --git a/{0} b/{0}\nnew file mode {1}\n--- /dev/null\n+++ b/{0}\n@@ -0,0 +1 @@\n+{2}\n"


@pytest.mark.fault("strange-code")
def test_a_recorded_patch_is_shown_and_applied_only_with_a_yes(repository: Path) -> None:
    (repository / "changes").write_text(GOOD)
    (repository / "params").write_text("a: 1\n")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    kept = {"params.yaml": str(repository / "params"), "changes.patch": str(repository / "changes")}
    said: list[str] = []
    with pytest.raises(UserError) as refused:
        _restore({"git_commit": commit}, kept, lambda _: False, said.append)
    assert refused.value.code == "E-ORIGIN-UNSEEN-PATCH", refused.value
    assert (repository / "code.py").read_text() == "one\n" and not (repository / "params.yaml").exists()
    assert any("code.py" in line for line in said), "git apply --stat"
    _restore({"git_commit": commit}, kept, lambda _: True, said.append)
    assert (repository / "code.py").read_text() == "two\n" and (repository / "params.yaml").exists()
    with pytest.raises(UserError) as refused:
        _restore({"git_commit": "--orphan"}, kept, lambda _: True, said.append)
    assert refused.value.code == "E-ORIGIN-COMMIT"


@pytest.mark.fault("strange-code")
@pytest.mark.parametrize(
    "patch",
    [
        NEW.format("link", "120000", "/etc"),
        NEW.format("sub", "160000", "Subproject commit " + "a" * 40),
        NEW.format(".git/hooks/post-checkout", "100755", "touch ran"),
        NEW.format("src/.GIT/config", "100644", "x"),
        NEW.format(".gitmodules", "100644", "x"),
        NEW.format("../outside", "100644", "x"),
        "diff --git a/code.py b/../code.py\nsimilarity index 100%\nrename from code.py\nrename to ../code.py\n",
        "diff --git a/code.py b/code.py\nold mode 100644\nnew mode 120000\n",
    ],
    ids=["link", "submodule", "hook", "case", "modules", "outside", "rename", "mode"],
)
def test_links_and_ways_out_of_the_project_in_a_patch_are_refused(repository: Path, patch: str) -> None:
    (repository / "changes").write_text(patch)
    before = sorted(path.name for path in repository.iterdir())
    with pytest.raises(UserError):
        _show_patch(str(repository / "changes"), lambda _: None)
    assert sorted(path.name for path in repository.iterdir()) == before
