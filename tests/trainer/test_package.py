"""A package read back ranks as the model that was exported, from raw features alone."""

from pathlib import Path

import numpy as np

from trainer.baselines import lists_of
from trainer.evaluate import TOP_K, held_out_groups
from trainer.package import Package
from trainer.train import Trained, served
from trainer.vocabulary import Vocabulary


def test_a_package_ranks_as_its_model(trained: Trained, exported: Path) -> None:
    package = Package.load(exported)
    log = trained.source.log
    source = package.source(log)
    catalogue = Vocabulary.of(log, split_ms=int(log.event_time_ms_N.max()))
    groups = held_out_groups(log, trained.groups, split_ms=trained.split_ms, seed=1)
    of_model = lists_of(served(trained).ranker(trained.gate, catalogue))(groups)
    of_package = package.ranker(source, catalogue)(groups)
    assert np.array_equal(of_package[:, :TOP_K], of_model[:, :TOP_K])
    assert (of_package[:, 0] > 0).all()
