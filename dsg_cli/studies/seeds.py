"""Does it hold for other SAEs, and for another draw of the data?

`sae` takes SAEs of other seeds. `seed` is the recipe's: which documents are drawn, and where they are cut into pieces.
"""

from __future__ import annotations

from dsg_cli.artifacts import Json
from dsg_cli.studies.names import AXES
from dsg_cli.studies.rig import Rig, guarded_rows


def rows_of(point: Json, rig: Rig) -> list[Json]:
    """The guardrail on the SAE and the data of a point, on every bench; `hook` and `n_in_sae` say which SAE it is.

    Raises:
        DsgError: The SAE cannot be read or does not fit the model, or the guardrail cannot be made.
    """
    guards = rig.guards_at({AXES[name].key: point[name] for name in ("sae", "seed") if name in point})
    identity = guards.ground.sae.identity
    return guarded_rows(point | {"hook": identity.hook, "n_in_sae": identity.n_features}, rig, guards)
