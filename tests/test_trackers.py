"""The mirror in MLflow, on a real server on loopback and on the default SQLite file."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_workspace import FakeWorkspace
from perdure.trackers import sync_mlflow
from perdure.types import InputError
from perdure.workspace import Workspace

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{folder}/server.db"]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    uri, end = f"http://127.0.0.1:{port}", time.monotonic() + 180
    try:
        while True:
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.3)
        yield uri
    finally:
        process.terminate()
        process.wait(30)


def chain(folder: Path) -> FakeWorkspace:
    """v001 promoted, v002 held."""
    fake = FakeWorkspace(folder)
    first = fake.start("colours")
    fake.metrics(first, steps=12)
    fake.candidate(first, {"colours": 8}, {"piqa": 60, "boolq": 52})
    second = fake.start("numbers")
    fake.candidate(second, {"colours": 7, "numbers": 9}, {"piqa": 58, "boolq": 52}, decision="held",
                   reasons=("colours: cannot tell.",))  # fmt: skip
    fake.workspace.hold("v002", reason="colours: cannot tell.")
    return fake


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri, uri)


def test_a_server_shows_runs_metrics_versions_and_aliases(server: str, tmp_path: Path):
    fake = chain(tmp_path / "helpdesk")
    mirror = sync_mlflow(fake.workspace, server)
    assert mirror.added == ("v000", "v001", "v002") and mirror.model == "helpdesk"
    seen = client(server)
    runs = {run.data.tags["perdure.version"]: run for run in seen.search_runs(
        [seen.get_experiment_by_name("helpdesk").experiment_id])}  # fmt: skip
    assert set(runs) == {"v000", "v001", "v002"}
    metrics = runs["v001"].data.metrics
    assert metrics["accuracy/colours"] == 0.8 and metrics["prior/piqa"] == 0.6 and metrics["cost/train_seconds"] == 100
    curve = seen.get_metric_history(runs["v001"].info.run_id, "train/loss")
    assert sorted(point.step for point in curve) == list(range(1, 13))
    assert runs["v001"].data.params["train.learning_rate"] == "0.0001"
    versions = {v.tags["perdure.version"]: v for v in seen.search_model_versions("name = 'helpdesk'")}
    assert versions["v002"].description == "colours: cannot tell." and versions["v002"].tags[
        "perdure.decision"] == "held"  # fmt: skip
    assert versions["v001"].run_id == runs["v001"].info.run_id
    aliases = {alias: v.tags["perdure.version"] for v in versions.values() for alias in
               seen.get_model_version("helpdesk", v.version).aliases}  # fmt: skip
    assert aliases == {"champion": "v001", "previous": "v000", "candidate": "v002"} == mirror.aliases


def test_repeating_adds_nothing_and_aliases_follow(server: str, tmp_path: Path):
    fake = chain(tmp_path / "again")
    sync_mlflow(fake.workspace, server)
    assert sync_mlflow(fake.workspace, server).added == ()
    fake.workspace.promote("v002", "looked at by hand")
    assert sync_mlflow(fake.workspace, server).aliases == {"champion": "v002", "previous": "v001"}
    seen = client(server)
    assert len(seen.search_model_versions("name = 'again'")) == 3
    assert set(seen.get_registered_model("again").aliases) == {"champion", "previous"}


def test_a_later_verdict_is_what_the_mirror_says(server: str, tmp_path: Path):
    fake = chain(tmp_path / "judged")
    sync_mlflow(fake.workspace, server)
    fake.workspace.append("verdict", version="v002", decision="promoted", reasons=["colours: kept."])
    assert sync_mlflow(fake.workspace, server).added == ()
    seen = client(server)
    found = {v.tags["perdure.version"]: v for v in seen.search_model_versions("name = 'judged'")}
    assert found["v002"].description == "colours: kept."
    assert found["v002"].tags["perdure.decision"] == "promoted"
    assert seen.get_run(found["v002"].run_id).data.tags["perdure.decision"] == "promoted"


def test_a_run_that_was_cut_off_is_made_again(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from perdure import trackers

    fake = chain(tmp_path / "torn")
    monkeypatch.setattr(trackers, "_metrics", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sync_mlflow(fake.workspace, server)
    monkeypatch.undo()
    assert sync_mlflow(fake.workspace, server).added == ("v000", "v001", "v002")
    seen = client(server)
    assert all("cost/train_seconds" in seen.get_run(v.run_id).data.metrics
               for v in seen.search_model_versions("name = 'torn'") if v.tags["perdure.version"] != "v000")  # fmt: skip


def test_without_a_server_the_mirror_is_a_file(tmp_path: Path):
    fake = chain(tmp_path / "local")
    mirror = sync_mlflow(fake.workspace)
    assert mirror.uri == f"sqlite:///{fake.folder}/mlflow.db" and (fake.folder / "mlflow.db").is_file()
    Workspace.open(fake.folder).verify_ledger()
    assert len(client(mirror.uri).search_model_versions("name = 'local'")) == 3


def test_a_server_that_is_not_there_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:9: MLflow says"):
        sync_mlflow(chain(tmp_path / "bot").workspace, "http://127.0.0.1:9")
