"""Goal: what is listed can be gone back to, and what nothing can go back to leaves no trace."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks.publish_bench import copy_package
from compose.clear_up import clear_up
from compose.cli.options import kafka_of
from compose.memories import retire
from compose.models_table import list_models
from compose.rollback import RollbackError, roll_back
from compose.serving import load_served_models
from features.lifelong_store import get_live_memories
from features.redis import connect
from scoring.signature import RECOMMEND_MODEL, RETRIEVAL_MODEL, Degraded
from scoring.triton import TritonServer
from streams.control import write_memories
from tests.asking import PatientRecommender, whole
from tests.waiting import until
from trainer.manifest import MANIFEST_FILE, MODEL_FILE
from trainer.repository import versions_on_disk

if TYPE_CHECKING:
    from benchmarks.publish_bench import Installation

# The installation is counted with the first test; on a busy machine Triton's loads take a minute.
pytestmark = pytest.mark.timeout(900)


def moveline(bench: Installation, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command."""
    return subprocess.run(
        [sys.executable, "-m", "compose.cli", *words],
        env=bench.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def ready(bench: Installation) -> list[int]:
    """Return the versions of the retrieval model that Triton takes requests for."""
    with TritonServer(bench.settings.triton.address) as server:
        found = server.versions()[RETRIEVAL_MODEL]
    return sorted(version for version, state, _ in found if state == "READY")


def says(bench: Installation) -> tuple[int, int, Degraded]:
    """Return which version spoke, which is live, and what was missing."""
    with PatientRecommender(bench.settings.triton.address) as recommender:
        said = whole(lambda: recommender.recommend(1)).provenance
    return said.model_version, said.live_version, said.degraded


def test_a_rollback_goes_back_and_forward_and_says_what_it_did(bench: Installation) -> None:
    newest = bench.publish(bench.packages[0])
    before = bench.versions().previous
    assert before is not None
    assert ready(bench) == [before, newest]
    done = moveline(bench, "rollback")
    assert done.returncode == 0, done.stderr
    assert f"version {before} answers instead of {newest}" in done.stderr
    assert says(bench) == (before, before, Degraded.NONE)
    # The one that was taken back is out of Triton's sight, the next one to go back to is in it.
    further = bench.versions().previous
    assert further is not None
    until(lambda: ready(bench) == [further, before], 20)
    assert roll_back(bench.settings, to=newest).before == before
    assert says(bench) == (newest, newest, Degraded.NONE)
    listed = {one.version: one for one in list_models(bench.settings)}
    assert (listed[newest].state, listed[before].state) == ("live", "previous")
    assert listed[before].back is None
    assert listed[before].coverage == 1.0
    shown = json.loads(moveline(bench, "models", "--json").stdout)
    assert [one["version"] for one in shown] == sorted(listed, reverse=True)
    assert shown[0]["num_bytes"] == listed[newest].num_bytes > 0


def test_what_was_never_live_cannot_be_gone_back_to(bench: Installation) -> None:
    live = bench.versions().live
    for to in (live, 99_999):
        with pytest.raises(RollbackError, match=rf"no going back from version {live} to .*{to}"):
            roll_back(bench.settings, to=to)


def test_a_damaged_version_is_not_gone_back_to(bench: Installation) -> None:
    previous = bench.versions().previous
    assert previous is not None
    model = bench.versions().folders[previous] / MODEL_FILE
    content = model.read_bytes()
    model.write_bytes(content[:-1])
    try:
        with pytest.raises(RollbackError, match=f"version {previous} is damaged"):
            roll_back(bench.settings)
    finally:
        model.write_bytes(content)


def test_other_features_or_no_memories_are_named_with_the_way_out(bench: Installation) -> None:
    versions = bench.versions()
    previous = versions.previous
    assert previous is not None
    path = versions.folders[previous] / MANIFEST_FILE
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), "feature_schema_hash": "0" * 16}))
    try:
        with pytest.raises(RollbackError, match="features that no generation has any more"):
            roll_back(bench.settings)
    finally:
        path.write_text(text)
    memory_version = versions.lived[previous].memory_version
    assert memory_version is not None
    kafka, topics = kafka_of(bench.settings)
    retire(bench.settings, kafka, topics, memory_version)
    try:
        with pytest.raises(
            RollbackError, match=f"lifelong build --memory-version {memory_version}"
        ):
            roll_back(bench.settings)
    finally:
        write_memories(kafka, topics, versions.folding)


def test_a_triton_that_starts_anew_serves_what_the_pointers_say(bench: Installation) -> None:
    """Until the version is loaded there it falls back, and says so; it never answers another."""
    live = bench.versions().live
    assert live is not None
    roll_back(bench.settings)
    back = bench.versions().live
    bench.restart_triton(load=False)
    with TritonServer(bench.settings.triton.address) as server:
        server.load(RECOMMEND_MODEL)
        assert says(bench) == (0, back, Degraded.MODEL_AWAY)
    load_served_models(bench.settings)
    assert says(bench) == (back, back, Degraded.NONE)
    roll_back(bench.settings, to=live)


def test_clearing_up_leaves_what_can_be_gone_back_to(bench: Installation) -> None:
    settings = bench.settings
    old = copy_package(bench.packages[0], settings.models / "gems-0", created_ms=0)
    manifest = json.loads((old / MANIFEST_FILE).read_text())
    manifest["files"][MODEL_FILE] = "f" * 64
    (old / MANIFEST_FILE).write_text(json.dumps(manifest))
    dead = shutil.copytree(
        bench.versions().folders[bench.versions().live or 0],
        settings.model_repository / RETRIEVAL_MODEL / "9000",
    )
    facts = {**json.loads((dead / MANIFEST_FILE).read_text()), "publish_token": 1}
    (dead / MANIFEST_FILE).write_text(json.dumps(facts))
    before = bench.versions()
    planned = clear_up(settings, keep=1, dry_run=True)
    assert bench.versions().folders == before.folders
    assert old.is_dir()
    done = clear_up(settings, keep=1)
    assert done == planned
    assert done.unproven == [dead]
    assert done.packages == [old]
    assert done.num_bytes > 0
    after = bench.versions()
    assert set(after.folders) == {before.live, before.previous}
    assert set(after.lived) & set(done.versions) == set()
    assert not old.exists()
    assert bench.leftovers() == []
    # What is left reads what is folded, and nothing else is.
    read = after.memories_read()
    assert {one.memory_version for one in after.folding} == read
    # The test before this one wrote the control topic alone; no near-line app is here to copy it.
    assert set(get_live_memories(connect(settings.redis.url))) <= set(after.folding)
    assert versions_on_disk(after.lifelong) == sorted(after.folders_folding())
    assert says(bench)[0] == before.live
    again = clear_up(settings, keep=1)
    assert (again.versions, again.unproven, again.packages) == ({}, [], [])
