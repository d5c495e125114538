"""What studies measure with, from a recipe and the features that it begins with: grounds, questions and text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsg_cli.artifacts import FeatureSet, Json
from dsg_cli.benches.tasks import Question
from dsg_cli.checkpoints import Checkpoint
from dsg_cli.corpora import Corpus, load_corpora
from dsg_cli.errors import DsgError
from dsg_cli.model import LoadedModel, context_length
from dsg_cli.pieces import Piece, draw_pieces
from dsg_cli.prompt_files import read_prompts
from dsg_cli.recipe import Recipe, values_at, with_values
from dsg_cli.stages import select, selecting
from dsg_cli.stages.calibration_text import all_pieces, piece_lengths
from dsg_cli.stages.chain import chain_sae
from dsg_cli.stages.session import Session
from dsg_cli.studies.asking import Asker
from dsg_cli.studies.guards import Ground, Guards, Wanted
from dsg_cli.studies.rig import Rig
from dsg_cli.tokens import bos_to_prepend
from dsg_cli.workspace import Stored, Workspace

BASE = "the recipe's ground"


class Rigging:
    """Makes what a study asks for, and keeps what it has made; nothing of it is written.

    Args:
        recipe: Settled, and in agreement with the features.
        workspace: Where the features are.
        features: What the study begins with.
        loaded: The whole model.
        questions: By bench.
        session: How it is run.
        checkpoint: Where passes over retain text are kept.
    """

    def __init__(
        self,
        recipe: Recipe,
        workspace: Workspace,
        features: Stored,
        loaded: LoadedModel,
        questions: Mapping[str, Sequence[Question]],
        session: Session,
        checkpoint: Checkpoint,
    ) -> None:
        self.recipe, self.workspace, self.features, self.loaded = recipe, workspace, features, loaded
        self.questions, self.session, self.checkpoint = questions, session, checkpoint
        file = recipe.calibrate.lengths_from
        self.prompts = read_prompts((), Path(file)) if file else []
        self.made = select.prepared(recipe, workspace, loaded=loaded)
        self._remembered = selecting.Remembered()
        self._selected: dict[str, selecting.Selected] = {}
        self._guards: dict[str, Guards] = {}
        self._askers: dict[int | None, Asker] = {}
        self._pieces: dict[tuple[str, int, bool], list[Piece]] = {}

    def rig(self, *, forget_bench: str, names: Sequence[str]) -> Rig:
        """All of it, as studies take it."""
        recipe = self.recipe
        return Rig(
            wanted=Wanted(
                recipe.select.n_features,
                recipe.select.ratio_percentile,
                recipe.calibrate.alpha,
                recipe.guardrail.strength,
            ),
            guards_at=self.guards_at,
            guards_on=self.guards_on,
            asker=lambda guards: self.asker(guards.ground.bos),
            pieces=self.pieces,
            forget=self.made.corpora["forget"],
            retain=recipe.corpora.retain,
            names=names,
            requests=[*(one.partition("=")[0] for one in recipe.corpora.forget[:1]), *recipe.study.sequence],
            forget_bench=forget_bench,
            repeats=recipe.study.repeats,
            seed=recipe.seed,
        )

    def guards_at(self, changes: Mapping[str, Any]) -> Guards:
        """Guardrails where the recipe has other values; the features are those of the artifact where it has not.

        Raises:
            DsgError: A corpus or an SAE cannot be read or used, or too few features pass.
        """
        changes = {key: value for key, value in changes.items() if values_at(self.recipe, [key])[key] != value}
        name = json.dumps(changes, sort_keys=True) if changes else BASE
        if name not in self._guards:
            if changes:
                recipe = with_values(self.recipe, changes)
                made = select.prepared(recipe, self.workspace, loaded=self.loaded)
                self._guards[name] = self._ground(name, recipe, made)
            else:
                assert self.features.header.sae is not None
                chain_sae(self.features.header.sae, self.features.id)
                body, tensors = self.features.body_as(FeatureSet), self.workspace.tensors(self.features)
                self._guards[name] = self._on(name, self.recipe, self.made, body, tensors)
        return self._guards[name]

    def guards_on(self, forget: Sequence[Corpus]) -> Guards:
        """Guardrails made with other forget text, and the recipe's retain text.

        Raises:
            DsgError: Too few features pass.
        """
        made = dataclasses.replace(self.made, corpora={**self.made.corpora, "forget": list(forget)})
        name = " ".join(f"{corpus.name} {corpus.sha256}" for corpus in forget)
        if name not in self._guards:
            self._guards[name] = self._ground(name, self.recipe, made)
        return self._guards[name]

    def asker(self, bos: int | None) -> Asker:
        """The questions, as they are asked where every sequence begins with that token."""
        if bos not in self._askers:
            self._askers[bos] = Asker(
                self.loaded,
                self.questions,
                bos=bos,
                batch_size=self.recipe.eval.batch_size,
                report=self.session.report,
            )
        return self._askers[bos]

    def pieces(self, part: str, length: int, is_packed: bool) -> list[Piece]:
        """Pieces of so many tokens, BOS not counted; what a user says in a chat has its own length, and is none."""
        key = (part, length, is_packed)
        if key not in self._pieces:
            settings = self.recipe.calibrate
            corpora = self.made.corpora["forget"] if part == "forget" else self._retain(self.recipe, self.made)
            self._pieces[key] = draw_pieces(
                self.loaded.tokenizer,
                [dataclasses.replace(corpus, weight=None) for corpus in corpora if not corpus.is_chat],
                "calibrate" if part == "calibrate" else "fresh",
                bos=self.bos,
                lengths=[length],
                is_packed=is_packed or settings.rows == "packed",
                at_most=settings.max_pieces,
                seed=self.recipe.seed,
            )
        return self._pieces[key]

    @property
    def bos(self) -> int | None:
        """Token that every sequence begins with on the recipe's own ground."""
        return bos_to_prepend(self.loaded.tokenizer, self.made.sae.identity.prepend_bos)

    def computed(self) -> Json:
        """What it took so far."""
        return {
            "text_passes": len(self._remembered.statistics),
            "gate_passes": sum(guards.n_passes for guards in self._guards.values()),
            "asked": sum(asker.n_asked for asker in self._askers.values()),
            "n_requests": sum(len(one.choices) for several in self.questions.values() for one in several),
        }

    def _ground(self, name: str, recipe: Recipe, made: selecting.Prepared) -> Guards:
        """A ground of its own, by the same pass as `dsg select`; what is known of a corpus is not computed again."""
        settings = recipe.select
        if recipe.calibrate.gate != "probe":
            settings = dataclasses.replace(settings, probe_features=0)
        corpora = {role: [one.described() for one in several] for role, several in made.corpora.items()}
        key = json.dumps([dataclasses.asdict(made.sae.identity), corpora, dataclasses.asdict(settings)])
        if key not in self._selected:
            # The checkpoint is of the points that are done: a pass that was interrupted begins anew.
            self._selected[key] = selecting.selected(
                made, settings, self.session, Checkpoint(), remembered=self._remembered
            )
        found = self._selected[key]
        return self._on(name, recipe, made, found.body, found.tensors)

    def _on(
        self, name: str, recipe: Recipe, made: selecting.Prepared, body: FeatureSet, tensors: Mapping[str, Any]
    ) -> Guards:
        """Guardrails on a ground whose features are known; retain text is cut as `dsg calibrate` cuts it."""
        loaded, settings = self.loaded, recipe.calibrate
        bos = bos_to_prepend(loaded.tokenizer, made.sae.identity.prepend_bos)
        room = context_length(loaded.model.config) - (bos is not None)
        lengths = piece_lengths(settings, loaded.tokenizer, self.prompts, bos=bos)
        if min(lengths) > room:
            raise DsgError(f"Pieces of {min(lengths)} tokens do not fit: the model reads {room}.", "Lower --lengths.")
        retain = self._retain(recipe, made)
        pieces = all_pieces(recipe, loaded, retain, [], {}, bos=bos, lengths=lengths, room=room)
        ground = Ground(name, loaded, made.sae, body, tensors, bos, pieces)
        return Guards(ground, settings, checkpoint=self.checkpoint, report=self.session.report)

    def _retain(self, recipe: Recipe, made: selecting.Prepared) -> list[Corpus]:
        """What thresholds are set on."""
        if not recipe.calibrate.retain:
            return made.corpora["retain"]
        return load_corpora(recipe.calibrate.retain, role="retain", limit=recipe.corpora.limit, seed=recipe.seed)


def questions_digest(questions: Sequence[Question]) -> str:
    """Of everything that is asked, in its order."""
    return hashlib.sha256(json.dumps([dataclasses.astuple(one) for one in questions]).encode()).hexdigest()
