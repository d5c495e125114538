"""Ask the same questions at many points: the base model once, a guarded one only what its gates open on.

To every token of a sequence that no gate has caught exactly 0 is added, so its answer is the base model's. What a gate
sees of the questions is computed once for all points at which it watches the same features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dsg_cli.attacks.asking import Outcome, outcomes, requests_of
from dsg_cli.benches.tasks import Question
from dsg_cli.detection import check_finite, gate_statistics
from dsg_cli.guardrail import guarded, last_decisions
from dsg_cli.model import LoadedModel, context_length
from dsg_cli.pieces import Piece
from dsg_cli.progress import Report, silent
from dsg_cli.scoring import Request, Score, score
from dsg_cli.studies.guards import Guard
from dsg_cli.tokens import TokenBatch, special_ids


class Asker:
    """Questions of several benches and what the base model answers.

    Args:
        loaded: The model, whole.
        questions: By bench.
        bos: Token that every sequence begins with.
        batch_size: Sequences in a batch.
        report: Progress.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        questions: Mapping[str, Sequence[Question]],
        *,
        bos: int | None,
        batch_size: int,
        report: Report = silent,
    ) -> None:
        self.loaded, self.questions = loaded, questions
        self.batch_size, self.report = batch_size, report
        self.max_length = context_length(loaded.model.config)
        self.n_asked = 0
        """Requests that went through the whole model."""
        of_bench = {bench: requests_of(loaded.tokenizer, several, bos=bos) for bench, several in questions.items()}
        self._requests = [request for several in of_bench.values() for request in several]
        self._n_requests = {bench: len(several) for bench, several in of_bench.items()}
        self._inputs = list(dict.fromkeys(request.inputs(self.max_length) for request in self._requests))
        self._seen: dict[str, dict[tuple[int, ...], float]] = {}
        """What a gate watches -> what it sees of each input."""
        self._base = self._scored(self._requests, ())

    def base(self) -> dict[str, list[Outcome]]:
        """What the model answers without any guardrail, by bench."""
        return self._outcomes(self._base, [False] * len(self._base))

    def under(self, guards: Sequence[Guard]) -> dict[str, list[Outcome]]:
        """What it answers under guardrails that act together, by bench.

        Raises:
            DsgError: An activation or a log-likelihood is not finite.
        """
        seen = [(guard, self._statistics(guard)) for guard in guards]
        is_open = {
            row: any(not statistics[row] <= guard.module.gate.threshold for guard, statistics in seen)
            for row in self._inputs
        }
        opened = [i for i, request in enumerate(self._requests) if is_open[request.inputs(self.max_length)]]
        found = self._scored([self._requests[i] for i in opened], guards)
        scores, decided = list(self._base), [False] * len(self._base)
        for i, one in zip(opened, found, strict=True):
            scores[i], decided[i] = one, bool(one.note)
        return self._outcomes(scores, decided)

    def _statistics(self, guard: Guard) -> dict[tuple[int, ...], float]:
        if guard.watches not in self._seen:
            pieces = [Piece(str(i), "", list(row)) for i, row in enumerate(self._inputs)]
            found = gate_statistics(self.loaded, [guard.module], pieces, what="questions", report=self.report)
            check_finite([statistic for _, _, (statistic,) in found])
            self._seen[guard.watches] = {self._inputs[i]: statistic for i, _, (statistic,) in found}
        return self._seen[guard.watches]

    def _scored(self, requests: Sequence[Request], guards: Sequence[Guard]) -> list[Score]:
        """Scores, noting of each whether a gate opened."""
        modules, model = [guard.module for guard in guards], self.loaded.model
        self.n_asked += len(requests)

        def note(_batch: TokenBatch) -> list[bool]:
            return [is_gated for _, is_gated, _ in last_decisions(modules)]

        # It is the model that the guardrails were made on a moment ago.
        with guarded(model, modules, allow_mismatch=True):
            return score(
                model,
                requests,
                pad=self.loaded.tokenizer.pad_token_id or 0,
                special=special_ids(self.loaded.tokenizer),
                batch_size=self.batch_size,
                max_length=self.max_length,
                device=str(model.device),
                note=note if modules else None,
                what="asking",
                report=self.report,
            )

    def _outcomes(self, scores: Sequence[Score], decided: Sequence[bool]) -> dict[str, list[Outcome]]:
        found: dict[str, list[Outcome]] = {}
        start = 0
        for bench, questions in self.questions.items():
            own = slice(start, start + self._n_requests[bench])
            found[bench] = outcomes(questions, scores[own], decided[own])
            start = own.stop
        return found
