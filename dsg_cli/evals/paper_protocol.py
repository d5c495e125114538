"""Base and unlearned model side by side under the paper's protocol (benches/paper.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dsg_cli.artifacts import Json
from dsg_cli.benches.paper import ORDERS, Letters, PaperQuestion, chosen_questions
from dsg_cli.checkpoints import Checkpoint
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import GuardrailModule, check_model
from dsg_cli.model import LoadedModel, context_length
from dsg_cli.progress import Report, silent
from dsg_cli.scorer import Decision, Known, Scorer
from dsg_cli.sides import SideBySide, counts, gate_rate
from dsg_cli.workers import ALONE, Workers
from dsg_cli.wrapper import WrapperModule


def evaluate_paper(
    loaded: LoadedModel,
    guardrails: Sequence[GuardrailModule],
    benches: Mapping[str, Sequence[PaperQuestion]],
    *,
    bos: int | None,
    batch_size: int = 32,
    limit: int | None = None,
    question_ids: Mapping[str, Sequence[str]] | None = None,
    unlearned: LoadedModel | None = None,
    wrappers: Sequence[WrapperModule] = (),
    samples: bool = False,
    allow_mismatch: bool = False,
    known: Known | None = None,
    workers: Workers = ALONE,
    checkpoint: Checkpoint | None = None,
    report: Report = silent,
) -> SideBySide:
    """Find the questions that the base model knows, and ask them of the unlearned model.

    Args:
        loaded: The base model, whole.
        guardrails: What unlearned it.
        benches: Questions of each bench.
        bos: Token that every prompt begins with.
        batch_size: Prompts in a batch; results depend on it by rounding only.
        limit: Questions of each data set of a bench to begin with, at most.
        question_ids: For a bench named here, these questions count, without a filter.
        unlearned: The model with changed weights that guardrails and wrappers are on; None if it is the base.
        wrappers: Of the unlearned model, in the order in which they act.
        samples: Keep the questions' texts in the rows.
        allow_mismatch: Also if the model is not the one that the guardrails were made for.
        known: Answers of the base model that an earlier evaluation got.
        workers: Who scores; each gets the whole result.
        checkpoint: Where scoring goes on from, and is kept.
        report: Progress.

    Raises:
        DsgError: An unknown id, a tokenizer without letters, or no question that the base model knows.
    """
    for guard in () if allow_mismatch else guardrails:
        check_model((unlearned or loaded).model, guard)
    letters = Letters(loaded.tokenizer, bos=bos)
    room = context_length(loaded.model.config)
    base = Scorer(loaded, (), batch_size, room, what="base model, letters", known=known or {}, report=report)
    after = Scorer(unlearned or loaded, guardrails, batch_size, room, what="unlearned model, letters", report=report)
    after.wrappers, after.bos = wrappers, bos
    for scorer in (base, after):
        scorer.workers, scorer.checkpoint = workers, checkpoint or Checkpoint()
    results: dict[str, Json] = {}
    gate: dict[str, Json] = {}
    rows: list[Json] = []
    kept_ids: dict[str, list[str]] = {}
    for bench, questions in benches.items():
        chosen = chosen_questions(bench, questions, question_ids or {})
        asked = _first_of_each(questions, limit) if chosen is None else chosen
        before = _ask(base, letters, asked, ORDERS[0])
        right = [_is_right(found, question) for (found, _), question in zip(before, asked, strict=True)]
        kept = list(asked)
        if chosen is None:
            kept = _known_in_every_order(
                base, letters, [q for q, is_right in zip(asked, right, strict=True) if is_right]
            )
        if not kept:
            raise DsgError(
                f"The base model answers none of the {len(asked)} questions of {bench} rightly in all {len(ORDERS)} "
                "orders of their options.",
                "Choose a stronger model, or another bench.",
            )
        of_base = {question.id: found for (found, _), question in zip(before, asked, strict=True)}
        answered = _ask(after, letters, kept, ORDERS[0])
        bench_rows = [
            _row(bench, question, of_base[question.id], *answer, samples)
            for question, answer in zip(kept, answered, strict=True)
        ]
        n = len(kept)
        sides = {
            "base": sum(_is_right(of_base[question.id], question) for question in kept),
            "unlearned": sum(_is_right(found, question) for (found, _), question in zip(answered, kept, strict=True)),
        }
        results[bench] = {side: {"acc": k / n, "n": n, **counts(k, n)} for side, k in sides.items()}
        results[bench]["base"] |= {"n_asked": len(asked), "acc_asked": sum(right) / len(asked)}
        gate[bench] = gate_rate(bench_rows)
        rows += bench_rows
        kept_ids[bench] = [question.id for question in kept]
    return SideBySide(
        results=results,
        gate=gate,
        rows=rows,
        n_tokens=base.n_tokens + after.n_tokens,
        answers=base.answers,
        n_known=base.n_known,
        question_ids=kept_ids,
    )


def _first_of_each(questions: Sequence[PaperQuestion], limit: int | None) -> list[PaperQuestion]:
    """The first questions of each data set, as lm-eval limits each task."""
    seen: dict[str, int] = {}
    kept = []
    for question in questions:
        name = question.id.partition("/")[0]
        seen[name] = seen.get(name, 0) + 1
        if limit is None or seen[name] <= limit:
            kept.append(question)
    return kept


def _known_in_every_order(scorer: Scorer, letters: Letters, questions: Sequence[PaperQuestion]) -> list[PaperQuestion]:
    """Those of some, all answered rightly in their own order, that are in all others too; each failure ends one."""
    kept = list(questions)
    for order in ORDERS[1:]:
        answers = _ask(scorer, letters, kept, order)
        kept = [q for q, (found, _) in zip(kept, answers, strict=True) if _choice(found) == q.right(order)]
    return kept


def _ask(
    scorer: Scorer, letters: Letters, questions: Sequence[PaperQuestion], order: Sequence[int]
) -> list[tuple[list[float], Decision | None]]:
    """The letters' log-likelihoods for each question, and what the gate decided."""
    requests = [letters.requests(question, order) for question in questions]
    scores, decisions = scorer([one for several in requests for one in several])
    answers, start = [], 0
    for several in requests:
        found = letters.loglikelihoods(scores[start : start + len(several)])
        answers.append((found, decisions[start]))
        start += len(several)
    return answers


def _choice(loglikelihoods: Sequence[float]) -> int:
    return max(range(len(loglikelihoods)), key=loglikelihoods.__getitem__)


def _is_right(loglikelihoods: Sequence[float], question: PaperQuestion) -> bool:
    return _choice(loglikelihoods) == question.answer


def _row(
    bench: str,
    question: PaperQuestion,
    base: list[float],
    unlearned: list[float],
    decided: Decision | None,
    samples: bool,
) -> Json:
    row: Json = {
        "bench": bench,
        "id": question.id,
        "group": question.subject,
        "length": decided.n_tokens if decided else 0,
        "statistic": decided.statistic if decided else 0.0,
        "gated": bool(decided and decided.gated),
        "edit": decided.edit if decided else 0.0,
        "answer": question.answer,
        "base": base,
        "unlearned": unlearned,
    }
    return row | ({"context": question.prompt(ORDERS[0]), "choices": list(question.options)} if samples else {})
