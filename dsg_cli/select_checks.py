"""What of a selection's settings has the right type and still makes no sense."""

from __future__ import annotations

import math

from dsg_cli.settings import SelectSection


def checks(select: SelectSection) -> tuple[tuple[bool, str], ...]:
    """Claims about the settings, each with what to say if it does not hold."""
    rate = select.max_retain_rate
    return (
        (select.n_features >= 1, f"select.n_features is {select.n_features}; take at least 1."),
        (
            0 <= select.ratio_percentile < 100,
            f"select.ratio_percentile is {select.ratio_percentile:g}; it must be at least 0 and below 100.",
        ),
        (select.max_rows >= 1, f"select.max_rows is {select.max_rows}; take at least 1."),
        (select.seq_len >= 2, f"select.seq_len is {select.seq_len}; it must be at least 2."),
        (select.probe_features >= 0, f"select.probe_features is {select.probe_features}; 0 fits no probe."),
        (
            select.probe_candidates >= max(select.probe_features, 1),
            f"select.probe_candidates is {select.probe_candidates}; give at least as many as select.probe_features.",
        ),
        (select.probe_tokens >= 100, f"select.probe_tokens is {select.probe_tokens}; take at least 100."),
        (
            0 < select.probe_ridge < math.inf,
            f"select.probe_ridge is {select.probe_ridge:g}; it must be a positive number.",
        ),
        (rate is None or 0 <= rate <= 1, f"select.max_retain_rate is {rate}; give a share from 0 to 1, or null."),
        (
            min(select.features, default=0) >= 0 and len(set(select.features)) == len(select.features),
            f"select.features is {select.features[:20]}; give different whole numbers from 0.",
        ),
        (
            select.describe is None or not select.features,
            "select.describe and select.features both say which features to take; leave one out.",
        ),
        (
            select.describe is not None or (select.descriptions is None and select.embedding is None),
            "select.descriptions and select.embedding are for select.describe, which is not given.",
        ),
    )
