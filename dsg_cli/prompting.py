"""The documents of a corpus as the model will read them: plain, or each as what a user says in its chat template."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from dsg_cli.corpora import Corpus, Part
from dsg_cli.errors import DsgError
from dsg_cli.tokens import as_chat


def check_chat(tokenizer: PreTrainedTokenizerBase, corpora: Sequence[Corpus]) -> None:
    """Refuse a corpus of chat turns for a model that has no chat template.

    Raises:
        DsgError: It has none.
    """
    for corpus in corpora:
        if corpus.is_chat and not tokenizer.chat_template:
            raise DsgError(
                f"The corpus {corpus.name} is put in the model's chat template, and its tokenizer has none.",
                "Leave it out, or take the instruction-tuned model.",
            )


def prompts(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, part: Part | None) -> list[str]:
    """The texts of one part, or of all parts, in the corpus's order."""
    texts = corpus.texts if part is None else corpus.part(part)
    return [as_chat(tokenizer, text) for text in texts] if corpus.is_chat else texts
