"""Four small GLUE-format tasks that the project generates itself, for runs without a network or downloaded data."""

import random
from pathlib import Path

VERSION = 1
SEED = 20240
TRAIN, DEV = 2000, 500

NOISE = {"agreement": 0.08, "entailment": 0.06, "similarity": 0.4, "majority": 0.0}
"""Share of examples with the other label, in train and dev alike, so that no method reaches 100 %; of `similarity`
the standard deviation of the scores' noise; none in `majority`, which is there for `data.label_noise`."""

SKEW = {"agreement": 0.75, "entailment": 0.9, "similarity": 0.9, "majority": 0.75}
"""How unevenly kinds of error are drawn. As in collected data, single words then carry part of the signal and the
rest needs comparing two places; with none (0.5) a small model from scratch does not get off the ground in seconds."""

VOCABULARY = Path(__file__).with_name("vocabulary.txt")
"""WordPiece vocabulary of the `tiny` model: every word below, and single characters for any other ASCII text."""

THINGS = {
    "animal": ("dog", "cat", "horse", "cow", "goat", "rabbit", "lion", "bird"),
    "person": ("doctor", "teacher", "farmer", "singer", "pilot", "lawyer", "nurse", "writer"),
    "vehicle": ("car", "truck", "bus", "train", "boat", "plane", "bicycle", "tram"),
    "tool": ("hammer", "drill", "saw", "spade", "axe", "knife", "wrench", "brush"),
}
ACTIONS = {
    "moving": ("falling", "rolling", "turning", "sliding"),
    "resting": ("lying", "standing", "waiting", "hanging"),
}
PLACES = {
    "outdoors": ("garden", "field", "street", "forest", "harbour"),
    "indoors": ("kitchen", "hall", "cellar", "office", "workshop"),
}
PLURALS = {"bus": "buses", "knife": "knives", "wrench": "wrenches", "brush": "brushes"}
VERBS = (("is", "are"), ("was", "were"), ("looks", "look"))
ADJECTIVES = ("old", "new", "red", "blue", "small", "large", "heavy", "quiet")
LINKS = ("near", "behind", "with", "beside", "under", "above")
OTHER_WORDS = ("the", "a", "an", "in", "not", ".")

Example = tuple[str, str | None, int | float]


def generate(name: str) -> dict[str, list[Example]]:
    """The train and dev examples (sentence1, sentence2 or None, label) of a built-in task.

    The same on every machine and Python version: it draws only from `random.random()`, whose sequence Python
    guarantees. No sentence or pair occurs twice, so train and dev share none.
    """
    made_by = (_agreement, _entailment, _similarity, _majority)
    make = {one.__name__.lstrip("_"): one for one in made_by}[name]
    draw = Draw(f"{name} {VERSION} {SEED}")
    examples: dict[tuple[str, str | None], Example] = {}
    while len(examples) < TRAIN + DEV:
        sentence1, sentence2, label = make(draw, SKEW[name], NOISE[name])
        examples.setdefault((sentence1, sentence2), (sentence1, sentence2, label))
    rows = list(examples.values())
    return {"train": rows[:TRAIN], "dev": rows[TRAIN:]}


def fingerprint(name: str) -> str:
    """What identifies the generated data: the generator's version, its parameters and its seed."""
    return f"builtin {name} version={VERSION} seed={SEED} train={TRAIN} dev={DEV} noise={NOISE[name]} skew={SKEW[name]}"


class Draw:
    """Seeded draws that use nothing but `random.random()`."""

    def __init__(self, seed: str):
        self.random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def one_of(self, options):
        return options[int(self.random() * len(options))]

    def kind(self, kinds: dict, first_half: float = 0.5) -> str:
        """A key of `kinds`, from the first half of them with that probability."""
        keys = tuple(kinds)
        half = len(keys) // 2
        return self.one_of(keys[:half] if self.chance(first_half) else keys[half:])

    def other_kind(self, kinds: dict, than: str, first_half: float) -> str:
        kind = self.kind(kinds, first_half)
        return kind if kind != than else self.other_kind(kinds, than, first_half)

    def normal(self) -> float:
        """About N(0, 1): a sum of twelve uniform draws, which needs no platform's logarithm."""
        return sum(self.random() for _ in range(12)) - 6.0


def _agreement(draw: Draw, skew: float, noise: float) -> Example:
    """Does the verb agree with the subject, whatever stands between them? 1 = acceptable.

    Most errors are a plural verb after a singular subject, as they are in people's speech.
    """
    acceptable = draw.chance(0.5)
    plural = draw.chance(0.5 if acceptable else 1 - skew)
    words = ["the"] + [draw.one_of(ADJECTIVES)] * draw.chance(0.3) + [_noun(draw, plural)]
    for _ in range(draw.one_of((0, 1, 1, 2))):
        words += [draw.one_of(LINKS), "the", _noun(draw, draw.chance(0.5))]
    words += [draw.one_of(VERBS)[plural == acceptable], draw.one_of(ADJECTIVES), "."]
    return " ".join(words), None, int(acceptable != draw.chance(noise))


def _noun(draw: Draw, plural: bool) -> str:
    noun = draw.one_of(THINGS[draw.kind(THINGS)])
    return PLURALS.get(noun, noun + "s") if plural else noun


def _entailment(draw: Draw, skew: float, noise: float) -> Example:
    """Does the second sentence, in wider terms, follow from the first? 0 = entailment, 1 = not_entailment."""
    entailed = draw.chance(0.5)
    first_half = 0.5 if entailed else skew
    thing, action, place = (draw.kind(kinds, first_half) for kinds in (THINGS, ACTIONS, PLACES))
    premise = (
        f"the {draw.one_of(ADJECTIVES)} {draw.one_of(THINGS[thing])} is {draw.one_of(ACTIONS[action])}"
        f" in the {draw.one_of(PLACES[place])} ."
    )
    claim = draw.one_of(("action", "place"))
    verb = "is"
    if not entailed:
        error = draw.random()
        if error < 0.5:
            thing = draw.other_kind(THINGS, thing, 1 - skew)
        elif error < 0.8:
            action = draw.other_kind(ACTIONS, action, 0.5)
            place = draw.other_kind(PLACES, place, 0.5)
        else:
            verb = "is not"
    article = "an" if thing[0] in "aeiou" else "a"
    hypothesis = f"{article} {thing} {verb} {action if claim == 'action' else place} ."
    return premise, hypothesis, int((not entailed) != draw.chance(noise))


def _similarity(draw: Draw, skew: float, noise: float) -> Example:
    """How much do two descriptions share? 5 = the same thing, action and place; less for the same kind of each."""
    sameness = draw.random()
    first, second, score = [], [], 0.0
    for kinds, weight in ((THINGS, 2.5), (ACTIONS, 1.5), (PLACES, 1.0)):
        same_kind = draw.chance(sameness)
        kind = draw.kind(kinds, 0.5 if same_kind else skew)
        word = draw.one_of(kinds[kind])
        if same_kind:
            other = word if draw.chance(0.5) else draw.one_of(kinds[kind])
        else:
            other = draw.one_of(kinds[draw.other_kind(kinds, kind, 1 - skew)])
        first.append(word)
        second.append(other)
        score += weight * (1.0 if word == other else 0.6 if same_kind else 0.0)
    negated, shortened = draw.chance(0.25), draw.chance(0.2)
    score = score * (0.5 if negated else 1.0) - (0.5 if shortened else 0.0) + noise * draw.normal()
    sentence1 = f"the {first[0]} is {first[1]} in the {first[2]} ."
    sentence2 = f"the {second[0]} is {'not ' * negated}{second[1]}{'' if shortened else f' in the {second[2]}'} ."
    return sentence1, sentence2, round(min(5.0, max(0.0, score)), 1)


def _majority(draw: Draw, skew: float, noise: float) -> Example:
    """Are most of the things named living ones? 1 = living.

    Every noun counts alike, wherever it stands, so that a small model finds the rule within a few epochs; the
    adjectives and the order say nothing, and by them it can learn single sentences by heart.
    """
    living = draw.chance(0.5)
    many = draw.one_of((3, 5))
    kinds: list[str] = []
    while not kinds or (2 * sum(kind in ("animal", "person") for kind in kinds) > many) != living:
        kinds = [draw.kind(THINGS, skew if living else 1 - skew) for _ in range(many)]
    words: list[str] = []
    for kind in kinds:
        words += [draw.one_of(LINKS)] * bool(words) + ["the"] + [draw.one_of(ADJECTIVES)] * draw.chance(0.5)
        words.append(draw.one_of(THINGS[kind]))
    return " ".join([*words, "."]), None, int(living != draw.chance(noise))
