"""Tell the model, in front of every prompt, that it does not know (2403.03329)."""

from __future__ import annotations

from dsg_cli.errors import DsgError
from dsg_cli.methods.settings import Prompt
from dsg_cli.methods.wrapping import Made, Material, prefix

SLOT = "{topic}"


def make(settings: Prompt, material: Material) -> Made:
    """The text, with its topic filled in; other braces stay as they are.

    Raises:
        DsgError: The text is empty, or has a topic and nothing says which.
    """
    if not settings.text.strip():
        raise DsgError("methods.prompt.text is empty.", "Write what the model is told.")
    return prefix("prompt", settings.text.replace(SLOT, topic_of(settings, material.topic)), material)


def topic_of(settings: Prompt, otherwise: str) -> str:
    """What `{topic}` stands for.

    Raises:
        DsgError: Nothing says so, and the text has it.
    """
    topic = settings.topic or otherwise
    if SLOT in settings.text and not topic.strip():
        raise DsgError(
            f"The text of methods.prompt has {SLOT}, and nothing says what that is.",
            "Name a corpus with --forget, or give --set methods.prompt.topic=WORDS.",
        )
    return topic
