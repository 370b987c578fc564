"""Goal: compiled or interpreted, a version answers alike, and only where the code fits is it run.

Method: one small model is compiled, which takes a minute; its library is held against the portable
graph, and looked for in the memory of the process that serves it.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from scoring.triton import TritonServer
from tests.scoring.tiny import tiny_log, tiny_training
from trainer.errors import ExportError
from trainer.export import Provenance, example_inputs, export, serving_of
from trainer.machine_code import write_machine_code
from trainer.manifest import MACHINE_CODE_FILE, read_manifest
from trainer.models.lifelong import NUM_ROWS, VALUE_WIDTH
from trainer.models.serving import PADDING
from trainer.publish import publish
from trainer.train import train
from trainer.triton_model.graph import load_graph, machine_code, portable
from trainer.warm_start import load_state

if TYPE_CHECKING:
    from compose.local.stack import LocalStack
    from trainer.train import Trained


@pytest.fixture(scope="module")
def trained(package: Path) -> Trained:
    """With a dense head: a model without one has no part that this one lacks.

    It reads the memories of the model that other tests have in the same Triton.
    """
    torch.set_num_threads(1)
    config = tiny_training()
    config = replace(config, model=replace(config.model, dense="on"))
    return train(tiny_log(), config, compressor=load_state(package).model.compressor)


@pytest.fixture(scope="module")
def compiled(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with machine code."""
    from features.schema import schema_hash  # noqa: PLC0415 - beside its only use
    from tests.small import SMALL  # noqa: PLC0415 - likewise

    folder = tmp_path_factory.mktemp("compiled") / "package"
    provenance = Provenance(
        name="gems",
        created_ms=1,
        window_from={"0": 0},
        window_to={"0": 1},
        feature_schema_hash=schema_hash(SMALL),
        metrics={},
    )
    export(trained, folder, provenance, machine_code="auto")
    return folder


def _asked(trained: Trained, batch: int, longer: int) -> list[torch.Tensor]:
    """Requests with random streams, some with a memory, some longer than trained for."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.from_numpy(trained.vocabulary.item_ids_V)
    inputs = list(example_inputs(serving_of(trained), batch=batch))
    lengths = {0: trained.source.num_recent, 5: trained.source.num_mid + longer}
    for place, length in lengths.items():
        drawn = torch.randint(-1, len(ids), (batch, length), generator=generator)
        inputs[place] = torch.where(drawn < 0, PADDING, ids[drawn])
        for field in range(1, 5):
            inputs[place + field] = torch.randint(0, 10**9, (batch, length), generator=generator)
    inputs[10] = torch.randn(batch, NUM_ROWS, VALUE_WIDTH, generator=generator)
    inputs[11] = torch.randint(0, 3, (batch, 1), generator=generator)
    return inputs


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("batch", "longer"), [(1, 0), (2, 5), (7, 1), (64, 0), (1, 100)])
def test_it_answers_as_the_portable_graph(
    compiled: Path, trained: Trained, batch: int, longer: int
) -> None:
    code = machine_code(compiled, read_manifest(compiled / "manifest.json"))
    assert code is not None
    inputs = _asked(trained, batch, longer)
    with torch.inference_mode():
        item, score, contribution = code(*inputs)
        wanted_item, wanted_score, wanted_contribution = portable(compiled)(*inputs)
    assert torch.equal(item[:, :10], wanted_item[:, :10])
    torch.testing.assert_close(score[:, :10], wanted_score[:, :10], rtol=1e-3, atol=0)
    torch.testing.assert_close(contribution, wanted_contribution, rtol=1e-3, atol=1e-6)


@pytest.mark.servers
@pytest.mark.timeout(600)
def test_triton_runs_it(
    compiled: Path, model_repository: Path, triton_stack: LocalStack, version: int
) -> None:
    assert version  # the small package is the first
    with TritonServer(triton_stack.addresses.triton_grpc) as server:
        published = publish(compiled, model_repository, [server])
    library = str(published.folder / MACHINE_CODE_FILE)
    assert any(library in text for text in _mapped())


def _mapped() -> list[str]:
    found = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            found.append(maps.read_text())
        except OSError:  # it has ended, or is not ours
            continue
    return found


@pytest.mark.parametrize(
    ("fact", "value", "because"),
    [
        ("torch_version", "2.0.0", "it is for torch 2.0.0"),
        ("cpu_flags", ["avx1024"], "this processor lacks avx1024"),
    ],
)
def test_what_does_not_fit_is_interpreted_and_said(
    compiled: Path,
    trained: Trained,
    fact: str,
    value: object,
    because: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    manifest = read_manifest(compiled / "manifest.json")
    manifest["machine_code"][fact] = value
    with caplog.at_level(logging.WARNING, logger="moveline.graph"):
        assert machine_code(compiled, manifest) is None
        item = load_graph(compiled, manifest)(*_asked(trained, 2, 0))[0]
    assert because in caplog.text
    assert (item >= 0).any()


def test_a_changed_library_is_not_published(compiled: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(compiled, tmp_path / "copy")
    with (copy / MACHINE_CODE_FILE).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ExportError, match=MACHINE_CODE_FILE):
        publish(copy, tmp_path, [])


def test_without_a_compiler_there_is_none_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING, logger="moveline.export"):
        assert write_machine_code(_small_graph(), (torch.zeros(2, 3),), tmp_path) is None
    assert "no g++ on PATH" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails_ends_the_export(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("g++", "gcc"):
        (tmp_path / name).write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    with pytest.raises(ExportError, match=r"(?s)C\+\+ compiler.*training\.machine_code"):
        write_machine_code(_small_graph(), (torch.zeros(2, 3),), tmp_path)


def test_the_manifest_says_what_it_is_for(compiled: Path) -> None:
    said = json.loads((compiled / "manifest.json").read_text())
    assert said["machine_code"]["torch_version"] == torch.__version__
    assert said["machine_code"]["file"] in said["files"]


def _small_graph() -> torch.export.ExportedProgram:
    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x * 2,)

    return torch.export.export(Twice(), (torch.zeros(2, 3),))
