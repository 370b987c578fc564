"""The package answers as the model does, without the project, without a pickle."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer.conftest import PROVENANCE, small_model, small_training
from trainer.dataset import EventLog, LabelGroups
from trainer.errors import ExportError
from trainer.export import (
    ITEM_IDS_FILE,
    MODEL_FILE,
    example_inputs,
    export,
    faster_mid_attention,
    pickles_in,
    serving_of,
    verify,
)
from trainer.models.config import GemsConfig
from trainer.models.serving import K_MAX, PADDING, GemsServing, input_signature
from trainer.train import Trained, train

NAMES = [spec.name for spec in input_signature(GemsConfig(), num_items=1)]
# Loads a package with torch alone and answers the tensors it finds beside it.
FOREIGN = """
import sys, torch
model = torch.export.load(sys.argv[1]).module()
assert not [name for name in sys.modules if name.split(".")[0] == "trainer"]
inputs = torch.load(sys.argv[2], weights_only=True)
torch.save(model(*inputs), sys.argv[3])
"""


def _raw_inputs(trained: Trained, groups: LabelGroups) -> tuple[Tensor, ...]:
    """The served form of real histories: raw ids, ages, hashes."""
    log, source = trained.source.log, trained.source
    rows, known = source.history_rows(groups)
    columns = (
        np.where(known, log.item_id_N[rows], PADDING),
        np.where(known, groups.time_ms_G[:, None] - log.event_time_ms_N[rows], 0),
        log.domain_N[rows],
        log.action_N[rows],
        log.dwell_ms_N[rows],
    )
    mid = [torch.from_numpy(column[:, : source.num_mid].copy()) for column in columns]
    recent = [torch.from_numpy(column[:, source.num_mid :].copy()) for column in columns]
    serving = GemsServing(trained.model, trained.vocabulary)
    rest = example_inputs(serving, batch=len(groups))[10:]
    return (*recent, *mid, *rest)


def _groups(trained: Trained, count: int) -> LabelGroups:
    return trained.groups.select(np.linspace(0, len(trained.groups) - 1, count).astype(np.int64))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_package_equals_eager(exported: Path, trained: Trained, batch: int) -> None:
    inputs = _raw_inputs(trained, _groups(trained, batch))
    loaded = torch.export.load(exported / MODEL_FILE).module()
    with torch.no_grad():
        expected = serving_of(trained)(*inputs)
        actual = loaded(*inputs)
    assert torch.equal(actual[0], expected[0])
    for got, wanted in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_a_thousand_users_get_the_items_of_the_trained_model(
    exported: Path, trained: Trained
) -> None:
    """Random states and streams, some longer than trained for; scores to 1e-3 relative."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.from_numpy(trained.vocabulary.item_ids_V)
    serving = serving_of(trained)
    loaded = torch.export.load(exported / MODEL_FILE).module()
    for number in range(20):
        inputs = list(example_inputs(serving, batch=50))
        longer = trained.source.num_mid + number
        for place, length in ((0, trained.source.num_recent), (5, longer)):
            drawn = torch.randint(-1, len(ids), (50, length), generator=generator)
            inputs[place] = torch.where(drawn < 0, PADDING, ids[drawn])
            for field in range(1, 5):
                inputs[place + field] = torch.randint(0, 10**9, (50, length), generator=generator)
        inputs[10] = 10 * torch.randn(50, 64, 64, generator=generator)
        inputs[11] = torch.randint(0, 3, (50, 1), generator=generator)
        with torch.no_grad():
            item, score, contribution = loaded(*inputs)
            wanted_item, wanted_score, wanted_contribution = serving(*inputs)
        assert torch.equal(item[:, :10], wanted_item[:, :10])
        torch.testing.assert_close(score[:, :10], wanted_score[:, :10], rtol=1e-3, atol=0)
        torch.testing.assert_close(contribution, wanted_contribution, rtol=1e-3, atol=1e-6)
        has_memory = inputs[11][:, 0] > 0
        assert ((contribution[:, 2] > 0) == has_memory).all()


def test_the_exporter_serves_what_it_measured_as_faster(
    log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which one is faster is the machine's affair; what follows from either is not.

    The model has a dense head, too, which those of the other tests lack.
    """
    measured = train(log, small_training(model=small_model(mid_attention="measured", dense="on")))
    assert faster_mid_attention(GemsServing(measured.model, measured.vocabulary).eval()) in {
        "full",
        "indexer",
    }
    for number, chosen in enumerate(("indexer", "full")):
        monkeypatch.setattr("trainer.export.faster_mid_attention", lambda _, one=chosen: one)
        manifest = export(measured, tmp_path / str(number), PROVENANCE)
        assert manifest["mid_attention"] == chosen
        graph = torch.export.load(tmp_path / str(number) / MODEL_FILE).graph_module.code
        assert ("topk" in graph) == (chosen == "indexer")
    inputs = _raw_inputs(measured, _groups(measured, 7))
    with torch.no_grad():
        expected = serving_of(measured)(*inputs)
        actual = torch.export.load(tmp_path / "1" / MODEL_FILE).module()(*inputs)
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], atol=1e-5, rtol=0)


def test_a_process_without_the_project_can_run_it(
    exported: Path, trained: Trained, tmp_path: Path
) -> None:
    inputs = _raw_inputs(trained, _groups(trained, 3))
    torch.save(inputs, tmp_path / "inputs")
    arguments = (str(exported / MODEL_FILE), str(tmp_path / "inputs"), str(tmp_path / "outputs"))
    subprocess.run([sys.executable, "-I", "-c", FOREIGN, *arguments], check=True, cwd=tmp_path)
    item_id, score, contribution = torch.load(tmp_path / "outputs", weights_only=True)
    assert item_id.shape == score.shape == (3, K_MAX)
    assert contribution.shape == (3, 5)
    known = set(trained.vocabulary.item_ids_V.tolist())
    assert set(item_id.flatten().tolist()) <= known | {PADDING}


def test_withdrawn_and_excluded_items_stay_away(exported: Path, trained: Trained) -> None:
    inputs = list(_raw_inputs(trained, _groups(trained, 2)))
    ids = trained.vocabulary.item_ids_V
    available = torch.from_numpy(np.arange(len(ids)) % 2 == 0)
    inputs[NAMES.index("available")] = available
    inputs[NAMES.index("exclude_item")][0, :3] = torch.from_numpy(ids[[0, 2, 4]])
    loaded = torch.export.load(exported / MODEL_FILE).module()
    item_id, score, _ = loaded(*inputs)
    withdrawn = set(ids[1::2].tolist())
    first, second = (set(row.tolist()) - {PADDING} for row in item_id)
    assert first == set(ids[::2].tolist()) - set(ids[[0, 2, 4]].tolist())
    assert second == set(ids[::2].tolist())
    assert not withdrawn & (first | second)
    assert torch.isneginf(score[item_id == PADDING]).all()


def test_no_pickle_inside(exported: Path) -> None:
    assert pickles_in(exported / MODEL_FILE) == []
    with zipfile.ZipFile(exported / MODEL_FILE) as archive:
        names = archive.namelist()
        assert not [name for name in names if name.endswith((".pkl", ".pickle"))]
        assert archive.read(next(n for n in names if n.endswith("sample_inputs/model.pt"))) == b""
        weights = [n for n in names if "/weights/weight_" in n]
        config = json.loads(
            archive.read(next(n for n in names if n.endswith("model_weights_config.json")))
        )
    assert len(weights) > 10
    assert not any(entry["use_pickle"] for entry in config["config"].values())


def test_a_planted_pickle_is_found(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "inner")
    with zipfile.ZipFile(tmp_path / "outer", "w") as archive:
        archive.write(tmp_path / "inner", "m/data/sample_inputs/model.pt")
        archive.writestr("m/data/weights/weight_0", b"\x80\x02 raw numbers may begin like this")
        archive.writestr("m/extra", b"\x80\x04\x95")
    assert pickles_in(tmp_path / "outer") == ["m/data/sample_inputs/model.pt", "m/extra"]


def test_manifest_says_what_was_exported(exported: Path, trained: Trained) -> None:
    manifest = verify(exported)
    ids = np.frombuffer((exported / ITEM_IDS_FILE).read_bytes(), "<i8")
    assert ids.tolist() == trained.vocabulary.item_ids_V.tolist()
    assert manifest["num_items"] == len(ids)
    assert manifest["window_to"] == {"0": 120, "1": 99}
    assert manifest["feature_schema_hash"] == "f" * 64
    assert manifest["config"]["loop"]["seed"] == trained.config.loop.seed
    assert manifest["torch_version"] == torch.__version__
    assert manifest["inputs"][0] == {
        "name": "recent_item",
        "dtype": "int64",
        "shape": [8],
        "batched": True,
    }


def test_a_changed_file_is_noticed(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    (tmp_path / ITEM_IDS_FILE).write_bytes(b"12345678")
    with pytest.raises(ExportError, match=ITEM_IDS_FILE):
        verify(tmp_path)


def test_a_used_staging_directory_is_refused(exported: Path, trained: Trained) -> None:
    with pytest.raises(ExportError, match="not empty"):
        export(trained, exported, PROVENANCE)
