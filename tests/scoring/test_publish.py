"""Publishing into a real Triton: versions go up, and what fails is taken out without a trace."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from scoring.errors import ModelLoadError
from scoring.signature import LIFELONG_MODEL, RECOMMEND_MODEL, RETRIEVAL_MODEL
from scoring.triton import TritonServer
from trainer.errors import ExportError, NotFiniteError, PublishError, StagingError
from trainer.export import (
    COMPRESSOR_FILE,
    ITEM_IDS_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    read_manifest,
    sha256_of,
)
from trainer.golden import PARITY_TOLERANCE, as_sent, compare_answers, read_golden
from trainer.manifest import GOLDEN_FILE
from trainer.publish import check_parity, publish, take_out
from trainer.repository import versions_on_disk

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def live(version: int, server: TritonServer) -> TritonServer:
    """A Triton that answers with a version."""
    assert server.is_ready(RETRIEVAL_MODEL, version)
    return server


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    """A package that a test may break."""
    return shutil.copytree(package, tmp_path / "package")


def rehash(package: Path, name: str) -> None:
    """Make a package's manifest agree with a file that a test has changed."""
    manifest = json.loads((package / MANIFEST_FILE).read_text())
    manifest["files"][name] = sha256_of(package / name)
    (package / MANIFEST_FILE).write_text(json.dumps(manifest))


def ready_versions(server: TritonServer) -> list[int]:
    found = server.versions()[RETRIEVAL_MODEL]
    return sorted(version for version, state, _ in found if state == "READY")


def assert_there(server: TritonServer, repository: Path, versions: list[int]) -> None:
    """Assert that exactly these versions are there, and all of them loaded."""
    assert versions_on_disk(repository / RETRIEVAL_MODEL) == versions
    assert ready_versions(server) == versions
    assert {path.name for path in repository.iterdir()} == {
        LIFELONG_MODEL,
        RECOMMEND_MODEL,
        RETRIEVAL_MODEL,
    }


def assert_answers(server: TritonServer, repository: Path, versions: list[int]) -> None:
    """Assert likewise, and that the newest of them answers as its package does."""
    assert_there(server, repository, versions)
    newest = repository / RETRIEVAL_MODEL / str(versions[-1])
    assert check_parity(newest, server, versions[-1]) <= PARITY_TOLERANCE


def test_a_package_that_triton_cannot_load_is_taken_out(
    live: TritonServer, copy: Path, model_repository: Path
) -> None:
    """Its manifest is in order: only the loading itself can find out."""
    before = versions_on_disk(model_repository / RETRIEVAL_MODEL)
    (copy / MODEL_FILE).write_bytes(b"no archive")
    rehash(copy, MODEL_FILE)
    with pytest.raises(PublishError, match="taken out again, what was live still is"):
        publish(copy, model_repository, [live])
    assert_answers(live, model_repository, before)


def test_answers_that_differ_are_taken_out(
    live: TritonServer,
    package: Path,
    model_repository: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both sides run one graph: the recorded answers have to be moved for a difference."""

    def differs(folder: Path, server: TritonServer, version: int) -> float:
        golden = read_golden(folder)
        answers = {**golden.outputs, "score": golden.outputs["score"] * 1.01}
        answered = server.infer(RETRIEVAL_MODEL, version, as_sent(golden.inputs), list(answers))
        return compare_answers(answered, replace(golden, outputs=answers))

    before = versions_on_disk(model_repository / RETRIEVAL_MODEL)
    with monkeypatch.context() as patched:
        patched.setattr("trainer.publish.check_parity", differs)
        with pytest.raises(PublishError, match="scores differ"):
            publish(package, model_repository, [live])
    assert_answers(live, model_repository, before)


@pytest.mark.parametrize("name", [MODEL_FILE, ITEM_IDS_FILE, GOLDEN_FILE])
def test_a_truncated_package_is_refused(
    live: TritonServer, copy: Path, model_repository: Path, name: str
) -> None:
    before = versions_on_disk(model_repository / RETRIEVAL_MODEL)
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ExportError, match=name):
        publish(copy, model_repository, [live])
    assert_there(live, model_repository, before)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"files": {}}'])
def test_a_package_without_its_manifest_is_refused(
    live: TritonServer, copy: Path, model_repository: Path, content: str | None
) -> None:
    before = versions_on_disk(model_repository / RETRIEVAL_MODEL)
    (copy / MANIFEST_FILE).unlink()
    if content is not None:
        (copy / MANIFEST_FILE).write_text(content)
    with pytest.raises(ExportError, match=MANIFEST_FILE):
        publish(copy, model_repository, [live])
    assert_there(live, model_repository, before)


def test_a_folder_that_triton_does_not_serve_is_refused(
    live: TritonServer, package: Path, tmp_path: Path
) -> None:
    with pytest.raises(PublishError, match="--model-repository"):
        publish(package, tmp_path, [live])
    assert list(tmp_path.iterdir()) == []


def test_without_triton_nothing_stays(package: Path, tmp_path: Path) -> None:
    """Also the removal must not hide the cause when there is no Triton to tell."""
    folders = [tmp_path / model for model in (LIFELONG_MODEL, RETRIEVAL_MODEL)]
    for folder in folders:
        folder.mkdir()
        (folder / "config.pbtxt").write_text("")
    with (
        TritonServer("127.0.0.1:9") as nobody,
        pytest.raises(PublishError, match="moveline status"),
    ):
        publish(package, tmp_path, [nobody])
    assert [versions_on_disk(folder) for folder in folders] == [[], []]


def test_the_lifelong_model_folds_as_the_package(
    live: TritonServer, package: Path, model_repository: Path, version: int
) -> None:
    manifest = read_manifest(model_repository / RETRIEVAL_MODEL / str(version) / MANIFEST_FILE)
    memory = manifest["lifelong_model_version"]
    assert memory == version
    sent = dict(read_golden(package).events)
    sent["item"][0, 10:] = -1
    answer = live.infer(LIFELONG_MODEL, memory, sent, ("state", "count"))
    assert answer["count"].tolist() == [[10], [64], [64], [64]]
    halves = [
        live.infer(
            LIFELONG_MODEL,
            memory,
            {name: np.ascontiguousarray(column[:, part]) for name, column in sent.items()},
            ("state", "count"),
        )
        for part in (slice(0, 7), slice(7, None))
    ]
    merged = halves[0]["state"] + halves[1]["state"]
    np.testing.assert_allclose(merged, answer["state"], rtol=1e-5, atol=1e-5)
    compressor = torch.export.load(package / COMPRESSOR_FILE).module()
    with torch.inference_mode():
        state, _ = compressor(*(torch.from_numpy(column) for column in sent.values()))
    np.testing.assert_allclose(answer["state"], state.numpy(), rtol=1e-5, atol=1e-5)


def test_a_compressor_that_cannot_be_loaded_takes_the_package_with_it(
    live: TritonServer, copy: Path, model_repository: Path
) -> None:
    """A new memory version, so that its compressor has to be published first."""
    before = versions_on_disk(model_repository / RETRIEVAL_MODEL)
    folding = versions_on_disk(model_repository / LIFELONG_MODEL)
    (copy / COMPRESSOR_FILE).write_bytes(b"no archive")
    manifest = json.loads((copy / MANIFEST_FILE).read_text())
    manifest["files"][COMPRESSOR_FILE] = sha256_of(copy / COMPRESSOR_FILE)
    manifest["memory_version"] = "0" * 16
    (copy / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(PublishError, match="of lifelong was taken out again"):
        publish(copy, model_repository, [live])
    assert versions_on_disk(model_repository / LIFELONG_MODEL) == folding
    assert_answers(live, model_repository, before)


def test_a_changed_version_is_not_loaded_and_the_others_stay(
    live: TritonServer, model_repository: Path, version: int
) -> None:
    """A byte of the weights flips on the disk, after all checks of the publication."""
    before = versions_on_disk(model_repository / RETRIEVAL_MODEL)
    damaged = model_repository / RETRIEVAL_MODEL / str(before[-1] + 1)
    shutil.copytree(model_repository / RETRIEVAL_MODEL / str(version), damaged)
    content = bytearray((damaged / MODEL_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / MODEL_FILE).write_bytes(content)
    try:
        with pytest.raises(ModelLoadError, match="was changed after it was published"):
            live.load(RETRIEVAL_MODEL)
        assert ready_versions(live) == before
    finally:
        take_out(damaged, [live])
    assert_answers(live, model_repository, before)


def test_scores_that_are_no_numbers_are_refused_before_anything_is_copied(
    live: TritonServer, copy: Path, model_repository: Path
) -> None:
    before = versions_on_disk(model_repository / RETRIEVAL_MODEL)
    golden = dict(np.load(copy / GOLDEN_FILE))
    golden["out.score"][0, 0] = np.nan
    np.savez(copy / GOLDEN_FILE, **golden)
    rehash(copy, GOLDEN_FILE)
    with pytest.raises(NotFiniteError, match="the package gives scores that are no numbers"):
        publish(copy, model_repository, [live])
    assert_there(live, model_repository, before)


def test_a_full_disk_leaves_nothing(
    live: TritonServer, package: Path, model_repository: Path
) -> None:
    """No file may become larger than this: the system refuses as it does on a full disk."""
    before = versions_on_disk(model_repository / RETRIEVAL_MODEL)
    smallest = (package / ITEM_IDS_FILE).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (smallest, hard))
    try:
        with pytest.raises(StagingError, match=r"could not be copied .* are free.*moveline gc"):
            publish(package, model_repository, [live])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert_answers(live, model_repository, before)


def test_versions_go_up_and_what_was_there_stays(
    live: TritonServer, package: Path, model_repository: Path
) -> None:
    """Last in this file: with one version less, every load before it takes half the time."""
    first = versions_on_disk(model_repository / RETRIEVAL_MODEL)
    newest_folding_version = versions_on_disk(model_repository / LIFELONG_MODEL)[-1]
    published = publish(package, model_repository, [live])
    assert published.version == first[-1] + 1
    assert published.folder == model_repository / RETRIEVAL_MODEL / str(published.version)
    assert 0 <= published.parity <= PARITY_TOLERANCE
    assert {path.name for path in published.folder.iterdir()} >= {
        MODEL_FILE,
        ITEM_IDS_FILE,
        MANIFEST_FILE,
        "model.py",
    }
    # The same memory version: what folds for the version before folds for this one.
    assert published.lifelong_version == newest_folding_version
    assert versions_on_disk(model_repository / LIFELONG_MODEL)[-1] == newest_folding_version
    assert_answers(live, model_repository, [*first, published.version])
