"""How a stage is run: who does it, from where it goes on, and what it returns instead of beginning at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from dsg_cli.artifacts import Header
from dsg_cli.checkpoints import SUFFIX, Checkpoint
from dsg_cli.committing import writing
from dsg_cli.interruption import Signalled
from dsg_cli.progress import Report, silent
from dsg_cli.workers import ALONE, Workers
from dsg_cli.workspace import Stored, Workspace, reuse_key


@dataclass(frozen=True)
class Session:
    """What the command line says about running, as the settings say what is computed."""

    reuse: bool = False
    """Return an existing artifact whose settings, inputs and versions all match."""
    resume: bool = False
    """Go on from the checkpoint of an interrupted run."""
    workers: Workers = ALONE
    report: Report = silent
    say: Callable[[str], None] = field(default=lambda _: None)
    """What a person should know now."""

    def named(self, workspace: Workspace, kind: str, wanted: str | None) -> str | None:
        """The artifact to start from: what is the newest when several workers look is what the first one sees."""
        if wanted is not None or self.workers.n == 1:
            return wanted
        return str(self.workers.agreed(workspace.find(kind).id if self.workers.is_first else None))

    def named_together(
        self, workspace: Workspace, wanted: Sequence[str], newest: Callable[[Workspace], str]
    ) -> Sequence[str]:
        """The artifacts to start from together, likewise; what is made names the one that was taken (`composition`)."""
        if wanted:
            return wanted
        return [str(self.workers.agreed(newest(workspace) if self.workers.is_first else None))]

    def existing(self, workspace: Workspace, header: Header) -> Stored | None:
        """What `--reuse` returns: every worker the same."""
        if not self.reuse:
            return None
        found = workspace.matching(header) if self.workers.is_first else None
        wanted = self.workers.agreed(found.id if found else None)
        return workspace.read(wanted) if wanted else None

    @contextmanager
    def checkpoint(self, workspace: Workspace, header: Header) -> Iterator[Checkpoint]:
        """The checkpoint of this run of this stage; gone after the block, unless that fails or is interrupted.

        Raises:
            DsgError: It is damaged.
        """
        path = workspace.folder / f".{header.kind}-{self._key(header)}{SUFFIX}"
        made = Checkpoint(path, resume=self.resume, lock=lambda: writing(workspace.folder))
        if self.resume:
            self.say("Going on from the checkpoint." if made.resumed else "No checkpoint of this run; it begins anew.")
        try:
            yield made
        except Signalled as stopped:
            made.write()
            stopped.is_kept = path.is_file()
            raise
        made.remove()

    def write(self, workspace: Workspace, make: Callable[[], Stored]) -> Stored:
        """The artifact that the first worker writes, in all of them."""
        stored = make() if self.workers.is_first else None
        wanted = self.workers.agreed(stored.id if stored else None)
        return stored or workspace.read(wanted)

    def _key(self, header: Header) -> str:
        """Digest of all that determines the result, and of how it is shared."""
        values = [repr(reuse_key(header)), self.workers.rank, self.workers.n]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


QUIET = Session()
