"""The processes that train together: one, or as many as torchrun started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.errors import DeviceError


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that train together."""

    device: torch.device
    number: int = 0
    num_ranks: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.number == 0

    def synchronised(self, module: nn.Module, *, may_skip: bool) -> nn.Module:
        """The module, with its gradients averaged over all ranks after each backward pass.

        Args:
            module: Equal on all ranks.
            may_skip: Whether a pass may leave parameters out; to find them costs time.
        """
        if self.num_ranks == 1:
            return module
        on_cuda = self.device.type == "cuda"
        return DistributedDataParallel(
            module,
            device_ids=[self.device.index] if on_cuda else None,
            # Tables are the same everywhere and never change.
            forward_sync_buffers=False,
            find_unused_parameters=may_skip,
        )

    def sums(self, *values: float) -> list[float]:
        """Each value summed over the ranks."""
        if self.num_ranks == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed

    def from_first(self, value: float) -> float:
        """The first rank's value, on all of them: clocks differ, decisions must not."""
        return self.sums(value if self.is_first else 0.0)[0]

    def wait(self) -> None:
        """Return once every rank is here."""
        if self.num_ranks > 1:
            distributed.barrier()


@contextmanager
def joined(device: Literal["cpu", "cuda", "auto"]) -> Iterator[Ranks]:
    """Yield this process' place; torchrun says by its environment that there are others.

    Inside another `joined` it yields the same place.

    Raises:
        DeviceError: There is no GPU, and one was asked for.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = chosen_device(device)
    if num_ranks == 1:
        yield Ranks(chosen)
        return
    if distributed.is_initialized():
        yield Ranks(chosen, distributed.get_rank(), num_ranks)
        return
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    distributed.init_process_group(backend)
    try:
        yield Ranks(chosen, distributed.get_rank(), num_ranks)
    finally:
        distributed.destroy_process_group()


def chosen_device(device: Literal["cpu", "cuda", "auto"]) -> torch.device:
    """The device to train on; of several GPUs the one that is this rank's.

    Raises:
        DeviceError: There is no GPU, and one was asked for.
    """
    is_there = torch.cuda.is_available()
    if device == "cuda" and not is_there:
        msg = (
            f"device is cuda, but torch {torch.__version__} sees no GPU; train with device cpu, or "
            "install a CUDA build of torch"
        )
        raise DeviceError(msg)
    if device == "cpu" or not is_there:
        return torch.device("cpu")
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(place)
    return place


def is_first_process() -> bool:
    """Whether this process is alone, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"
