"""Publishing into a real Triton: versions go up, and what fails is taken out without a trace."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from scoring.signature import LIFELONG_MODEL, RECOMMEND_MODEL, RETRIEVAL_MODEL
from scoring.triton import TritonServer
from trainer.errors import ExportError, PublishError
from trainer.export import (
    COMPRESSOR_FILE,
    ITEM_IDS_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    read_manifest,
    sha256_of,
)
from trainer.publish import (
    PARITY_TOLERANCE,
    check_parity,
    golden_events,
    publish,
    versions_on_disk,
)

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


def ready_versions(server: TritonServer) -> list[int]:
    found = server.versions()[RETRIEVAL_MODEL]
    return sorted(version for version, state, _ in found if state == "READY")


def assert_there(server: TritonServer, repository: Path, versions: list[int]) -> None:
    """Assert that exactly these versions are there, the newest two of them loaded."""
    assert versions_on_disk(repository / RETRIEVAL_MODEL) == versions
    assert ready_versions(server) == versions[-2:]
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
    manifest = json.loads((copy / MANIFEST_FILE).read_text())
    manifest["files"][MODEL_FILE] = sha256_of(copy / MODEL_FILE)
    (copy / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(PublishError, match="taken out again, what was live still is"):
        publish(copy, model_repository, live)
    assert_answers(live, model_repository, before)


def test_answers_that_differ_are_taken_out(
    live: TritonServer,
    package: Path,
    model_repository: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a tolerance nothing can meet: both sides run one graph, so that nothing else differs."""
    before = versions_on_disk(model_repository / RETRIEVAL_MODEL)
    with monkeypatch.context() as patched:
        patched.setattr("trainer.publish.PARITY_TOLERANCE", -1.0)
        with pytest.raises(PublishError, match="scores differ"):
            publish(package, model_repository, live)
    assert_answers(live, model_repository, before)


@pytest.mark.parametrize("name", [MODEL_FILE, ITEM_IDS_FILE])
def test_a_truncated_package_is_refused(
    live: TritonServer, copy: Path, model_repository: Path, name: str
) -> None:
    before = versions_on_disk(model_repository / RETRIEVAL_MODEL)
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ExportError, match=name):
        publish(copy, model_repository, live)
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
        publish(copy, model_repository, live)
    assert_there(live, model_repository, before)


def test_a_folder_that_triton_does_not_serve_is_refused(
    live: TritonServer, package: Path, tmp_path: Path
) -> None:
    with pytest.raises(PublishError, match="--model-repository"):
        publish(package, tmp_path, live)
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
        publish(package, tmp_path, nobody)
    assert [versions_on_disk(folder) for folder in folders] == [[], []]


def test_the_lifelong_model_folds_as_the_package(
    live: TritonServer, package: Path, model_repository: Path, version: int
) -> None:
    manifest = read_manifest(model_repository / RETRIEVAL_MODEL / str(version) / MANIFEST_FILE)
    memory = manifest["lifelong_model_version"]
    assert memory == version
    events = golden_events(package, manifest)
    sent = {name: tensor.numpy().copy() for name, tensor in events.items()}
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
        publish(copy, model_repository, live)
    assert versions_on_disk(model_repository / LIFELONG_MODEL) == folding
    assert_answers(live, model_repository, before)


def test_versions_go_up_and_two_stay_loaded(
    live: TritonServer, package: Path, model_repository: Path
) -> None:
    """Last in this file: with one version less, every load before it takes half the time."""
    first = versions_on_disk(model_repository / RETRIEVAL_MODEL)
    newest_folding_version = versions_on_disk(model_repository / LIFELONG_MODEL)[-1]
    published = publish(package, model_repository, live)
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
