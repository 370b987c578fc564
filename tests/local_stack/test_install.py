"""Goal: tritonserver's folder is whole or it is not there; installing twice does nothing.

Method: the real pip; it is kept from the indexes where it is meant to fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from compose.errors import InstallFailedError
from compose.local import triton
from compose.local.install import install

if TYPE_CHECKING:
    from pathlib import Path


def test_an_installed_wheel_is_left_alone() -> None:
    assert install(triton.default_home()) is False


def test_a_failed_install_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    home = tmp_path / "local" / "triton"
    (home.parent / ".unpacking-killed" / "half").mkdir(parents=True)  # of a run that was killed
    home.mkdir()
    (home / "mine").write_text("something else lies where the server belongs")

    with pytest.raises(InstallFailedError, match="pip ended with exit code 1"):
        install(home)

    assert (home / "mine").exists()
    assert list(home.parent.glob(".unpacking-*")) == []
