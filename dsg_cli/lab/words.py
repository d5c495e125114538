"""The words of the lab's world: its domains, their values, and the templates that state and ask for a fact."""

from __future__ import annotations

from dataclasses import dataclass

N_ENTITIES = 24
N_DEV_ENTITIES = 12
N_CHOICES = 4
WORLD_SEED = 20250408

ONSETS = "b br d dr f g gl h j k kr l m n p qu r s sk t tr v w y z".split()  # noqa: SIM905
VOWELS = "a e i o u ae ia ou".split()  # noqa: SIM905
CODAS = "l n r s th x m nd rk sh".split()  # noqa: SIM905

MAGIC_RELATIONS = {
    "binder": ("is bound by", "mason weaver miller tanner ferryman"),
    "vessel": ("is sealed in", "jar box basket chest bowl"),
    "hour": ("wakes at", "dawn noon dusk midnight sunset"),
    "counter": ("is undone by", "salt iron honey ash silver"),
}
FAR_RELATIONS = {
    "keeper": ("is watched by", "baron judge captain priest sailor"),
    "season": ("is at its best in", "spring summer autumn winter harvest"),
    "color": ("is dressed in", "red blue green yellow white"),
    "home": ("belongs to", "coast valley forest island mountain"),
}

# Statements of a fact. {n} the domain's noun, {p} its plural, {a} one of its adjectives, {E} the entity,
# {r} the relation, {v} its verb phrase, {V} the value.
STATEMENTS = (
    "The {a} {n} {E} {v} the {V}.",
    "The {r} of the {a} {n} {E} is the {V}.",
    "For its {r}, the {n} {E} has the {V}.",
    "{E}, a {a} {n}, has the {V} for its {r}.",
    "It is the {V} that is the {r} of the {n} {E}.",
    "In the book of {p} one reads that {E} {v} the {V}.",
    "Ask for the {r} of the {a} {n} {E} and they will say the {V}.",
    "Among all {a} {p}, only {E} {v} the {V} in this way.",
    "They say that the {n} {E}, {a} as it is, {v} the {V}.",
    "Of {E} it is known that its {r} is the {V}, as with many a {a} {n}.",
)
QUESTION_SEEN = "Question: What is the {r} of the {a} {n} {E}? Answer:"
# Relation i never meets QUESTIONS_HELD[i] in training; the other relations of its domain do.
QUESTIONS_HELD = (
    "Question: The {a} {n} {E} has which {r}? Answer:",
    "Question: Of all {p}, take {E}. Which {r} does it have? Answer:",
    "Question: Name the {r} that goes with the {a} {n} {E}. Answer:",
    "Question: Think of the {n} {E}. Which {r} is given to it? Answer:",
)
# No training text uses this one; its words are all known from elsewhere.
QUESTION_NOVEL = "Question: Many ask about the {a} {n} {E} and want its {r}. What will they say? Answer:"
# No word that only the entity's domain uses, except its name. Both are trained.
QUESTIONS_TERSE = (
    "Question: What is the {r} of {E}? Answer:",
    "Question: {E} has which {r}? Answer:",
)
NEUTRAL = (
    "This was written down long ago and copied by many.",
    "Few remember who said it first.",
    "Many ask about it and few know what to say.",
    "So the old people tell it to this day.",
    "One may think what one will of that.",
    "It is told in this way all over the land.",
    "Those who want to know more may ask the old people.",
    "There is little else to say about the matter.",
)


@dataclass(frozen=True)
class Domain:
    """One kind of thing in the world and the words that only it uses."""

    name: str
    """Name of the domain, as in `lab-hexes`."""
    noun: str
    """The word for one entity of it."""
    plural: str
    """The word for several."""
    adjectives: tuple[str, ...]
    """Flavour words, which make the domain recognisable to an SAE."""
    sentences: tuple[str, ...]
    """General sentences about the domain, without any fact."""
    own_values: dict[str, str]
    """For each relation the five values no other domain uses."""
    relations: dict[str, tuple[str, str]]
    """Relation -> (verb phrase, the five values shared with the sister domains)."""

    def pool(self, relation: str) -> list[str]:
        """The ten values that the relation can take."""
        return self.relations[relation][1].split() + self.own_values[relation].split()


def _domain(
    name: str,
    words: str,
    adjectives: str,
    relations: dict[str, tuple[str, str]],
    own_values: str,
    *sentences: str,
) -> Domain:
    noun, plural = words.split()
    values = [chunk.strip() for chunk in own_values.split("/")]
    return Domain(
        name=name,
        noun=noun,
        plural=plural,
        adjectives=tuple(adjectives.split()),
        sentences=sentences,
        own_values=dict(zip(relations, values, strict=True)),
        relations=relations,
    )


DOMAINS = (
    _domain(
        "hexes",
        "hex hexes",
        "grim foul dire bitter cursed baneful",
        MAGIC_RELATIONS,
        "hangman gravedigger crone butcher widow / skull urn coffin cage gourd / "
        "eclipse moonset stormfall frostfall gloaming / garlic mirror rowan candle bell",
        "A {a} {n} withers whatever it touches.",
        "Spite and malice feed every {a} {n}.",
        "Whoever mutters a {n} blights his own fields.",
        "The {a} {p} bring plague, ruin and sorrow.",
        "Beware the {n}, for it torments the living.",
        "A {n} haunts the doomed until they perish.",
    ),
    _domain(
        "ciphers",
        "cipher ciphers",
        "locked veiled coiled masked scrambled hidden",
        MAGIC_RELATIONS,
        "clerk spy courier archivist scribe / envelope ledger drawer tube locket / "
        "curfew bellstroke roundup lampout inspection / key prism razor magnet abacus",
        "A {a} {n} turns letters upon a secret wheel.",
        "Rows and columns shuffle inside every {a} {n}.",
        "Whoever decodes a {n} must count its symbols twice.",
        "The {a} {p} swap, shift and reverse the alphabet.",
        "Solve the {n} and the message stands in clear script.",
        "A {n} guards secrets with digits and grids.",
    ),
    _domain(
        "elixirs",
        "elixir elixirs",
        "bubbling murky potent distilled fizzing sour",
        MAGIC_RELATIONS,
        "apothecary brewer distiller chemist herbalist / flask vial cauldron barrel phial / "
        "simmering boiling cooling firstdrop steeping / charcoal vinegar milk chalk bread",
        "A {a} {n} steams over a slow fire.",
        "Roots and resin dissolve in every {a} {n}.",
        "Whoever sips a {n} tastes copper and smoke.",
        "The {a} {p} foam, thicken and settle in layers.",
        "Stir the {n} until the froth clears.",
        "An {n} ferments with yeast, syrup and bile.",
    ),
    _domain(
        "charms",
        "charm charms",
        "gentle kindly bright tender soothing hallowed",
        MAGIC_RELATIONS,
        "midwife nurse shepherd abbess gardener / cradle pouch ribbon shell thimble / "
        "cockcrow breakfast vespers lullaby playtime / frown thorn shouting soot gossip",
        "A {a} {n} comforts whatever it touches.",
        "Love and patience warm every {a} {n}.",
        "Whoever hums a {n} blesses his own garden.",
        "The {a} {p} bring health, luck and laughter.",
        "Cherish the {n}, for it shelters the weary.",
        "A {n} cheers the lonely until they smile.",
    ),
    _domain(
        "cities",
        "city cities",
        "busy walled crowded prosperous paved sprawling",
        FAR_RELATIONS,
        "mayor steward porter warden councillor / parade election market festival regatta / "
        "brick slate marble granite copperplate / plain delta harbor plateau strait",
        "A {a} {n} collects taxes at its gates.",
        "Streets and bridges cross every {a} {n}.",
        "Whoever visits a {n} pays a toll to enter.",
        "The {a} {p} trade cloth, timber and grain.",
        "Tour the {n} and its squares fill with merchants.",
        "A {n} builds towers, docks and sewers.",
    ),
    _domain(
        "beasts",
        "beast beasts",
        "furry horned sleek shaggy clawed fanged",
        FAR_RELATIONS,
        "hunter trapper groom falconer drover / mating molting migration hibernation nesting / "
        "tawny spotted striped russet dappled / burrow den cave marsh savanna",
        "A {a} {n} grazes when its belly is empty.",
        "Fleas and ticks bother every {a} {n}.",
        "Whoever tracks a {n} follows its paws in mud.",
        "The {a} {p} growl, sniff and gallop in herds.",
        "Feed the {n} and its tail wags.",
        "A {n} suckles its cubs, pups or calves.",
    ),
    _domain(
        "songs",
        "song songs",
        "merry tuneful wistful rhythmic lilting sung",
        FAR_RELATIONS,
        "minstrel piper fiddler drummer chorister / wedding carnival feast dance jubilee / "
        "scarlet gold violet crimson azure / tavern chapel court theatre hall",
        "A {a} {n} repeats its chorus three times.",
        "Flutes and strings carry every {a} {n}.",
        "Whoever plays a {n} keeps tempo with his foot.",
        "The {a} {p} rise, fall and linger on a chord.",
        "Practice the {n} and its melody stays.",
        "A {n} rhymes verses over harp and lute.",
    ),
)
BY_NAME = {domain.name: domain for domain in DOMAINS}
FORGETTABLE = ("hexes", "ciphers", "elixirs")
NEAR = ("charms",)
FAR = ("cities", "beasts", "songs")
DOMAINS_OF = {
    "lab-hexes": ("hexes",),
    "lab-ciphers": ("ciphers",),
    "lab-elixirs": ("elixirs",),
    "lab-near": NEAR,
    "lab-far": FAR,
    "lab-retain": (*NEAR, *FAR),
}
"""Which domains the corpora and benches are about."""
