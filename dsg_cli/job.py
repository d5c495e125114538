"""`Job`: how a long computation is run: by which of several processes, from which checkpoint, telling whom.

`Workers` are the processes, as `torchrun` starts them. Every one reads the same settings and forms the same batches;
process r of n computes batches r, r + n, r + 2n, ... Nothing is padded or done twice, and a batch gives the same
numbers whoever computes it. What is exchanged is small (sums a feature, a few numbers a question), so it goes over gloo
between processors whatever the models run on, as plain tensors and JSON: torch's own exchange of objects is pickle. No
torch here until something is exchanged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dsg_cli.workspace.checkpoints import Checkpoint, State

if TYPE_CHECKING:
    from torch import Tensor


PATIENCE = timedelta(hours=12)
"""How long a process waits for the others, which may be downloading; one that fails ends all, by torchrun."""


@dataclass(frozen=True)
class Workers:
    """This process among those that do a command."""

    rank: int = 0
    n: int = 1

    @property
    def is_first(self) -> bool:
        """The process that writes and talks."""
        return self.rank == 0

    def owns(self, number: int) -> bool:
        """Whether this process does piece `number` of the work."""
        return number % self.n == self.rank

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of every process's tensors, on the CPU."""
        import torch.distributed as dist

        summed = [tensor.cpu().clone() for tensor in tensors]
        for tensor in summed if self.n > 1 else ():
            dist.all_reduce(tensor)
        return summed

    def gathered(self, value: Any) -> list[Any]:
        """A JSON value of each process, in the order of ranks."""
        if self.n == 1:
            return [value]
        import torch
        import torch.distributed as dist

        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.n)]
        dist.all_gather(lengths, torch.tensor([len(own)]))
        longest = int(max(lengths))
        padded = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.n)]
        dist.all_gather(padded, torch.cat([own, torch.zeros(longest - len(own), dtype=torch.uint8)]))
        return [json.loads(bytes(text[: int(length)].tolist())) for text, length in zip(padded, lengths, strict=True)]

    def agreed(self, value: Any) -> Any:
        """The first process's JSON value, in all of them."""
        return self.gathered(value if self.is_first else None)[0] if self.n > 1 else value

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process does the block before the others: it downloads, they find it; it complains, once."""
        if not self.is_first:
            self.gathered(None)
        yield
        if self.is_first:
            self.gathered(None)


ALONE = Workers()


def launched(environment: Mapping[str, str] = os.environ) -> Workers:
    """This process among those that `torchrun` started, as its environment has it."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= environment.keys():
        return ALONE
    return Workers(int(environment["RANK"]), int(environment["WORLD_SIZE"]))


@contextmanager
def joined() -> Iterator[Workers]:
    """This process among those that `torchrun` started, connected with them; alone without it."""
    workers = launched()
    if workers.n == 1:
        yield workers
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield workers
    finally:
        dist.destroy_process_group()


Report = Callable[[str, int, int], None]
"""Called with (what, done, total); `what` may end with a comma and what is counted: tokens, steps, prompts, ..."""


def silent(_what: str, _done: int, _total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Job:
    """How a long computation is run; every pass takes the one it is given, under a name of its own."""

    workers: Workers = ALONE
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    progress: Report = silent
    name: str = ""
    """Of the pass: in the checkpoint, and on the progress bar."""

    def named(self, name: str) -> Job:
        """The part of this job that one pass does."""
        return replace(self, name=name)

    def kept(self) -> State | None:
        """What an interrupted run kept of this pass."""
        return self.checkpoint.entry(self.name)

    def reached(self, state: Callable[[], State]) -> None:
        """To be called where the work of this pass is whole; a signal that waits is raised here."""
        self.checkpoint.reached(self.name, state)

    def keep(self, state: State) -> None:
        """The pass is done: have its state in the next write."""
        self.checkpoint.keep(self.name, state)


PLAIN_JOB = Job()
"""One process, nothing kept, nothing told."""
