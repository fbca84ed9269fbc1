"""A sample corpus of little stories, drawn from a grammar whose entropy is known exactly.

So a demo can print a model's loss beside the floor under it: on average over unseen documents, no model spends
fewer nats on one than `entropy()`, and a model that reads blocks cut anywhere can only do worse. A single file may lie
a little above or below the expectation, so `write` also gives its own negative log-likelihood.

A document is one line, drawn in two steps:

1. The facts: one entry of each table in FACTS (who, where, which craft, ...). All sentences draw on them, which is
   what there is to learn at a long range: {name} in the first sentence decides every {he}, {his} and {him} after it.
2. The words, by a probabilistic context-free grammar, GRAMMAR. In its expansions <x> is a nonterminal, {x} a fact and
   everything else a word. The facts change no rule's probability.

The entropy of this derivation is the entropy of the facts plus h[story], where a nonterminal's h is the entropy of its
own choice of a rule plus the h of each nonterminal in the expansion chosen, times the number expected of it:
h = e + M h, hence h = (I - M)^-1 e. How many sentences follow is the choice of a rule like all others.

It is the entropy of the text too, as no text has two derivations:

- Alternatives part at the first word that differs, and what they share up to there has one structure. Recursion is to
  the right only: in "the gate near the mill behind the inn" each phrase belongs to the noun before it. The tests prove
  it for all texts: they follow every two derivations of a story in lockstep, with each {fact} free to take any value
  anywhere, and no two of them spell the same.
- Whichever rules it takes, a story tells of each table a fact that no other entry has: name, friend, relation, colour,
  animal, season, town, craft with product.
- Spelling (`render`) can be undone: capitals where sentences start, "an" for "a", no space before a comma or period.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

Weighted = list[tuple[float, Any]]  # alternatives with their weights, which need not sum to one
Rules = Mapping[str, Weighted]


def zipf(entries: str, suffix: str = "") -> Weighted:
    """The entries, parted by commas, with `suffix` behind each and weights 1/4, 1/5, 1/6, ...

    Zipf's law, started late so that the first word does not drown the others. Division alone rounds alike everywhere.
    """
    return [(1 / (rank + 4), entry.strip() + suffix) for rank, entry in enumerate(entries.split(","))]


def table(columns: str, rows: str) -> Weighted:
    """Facts named `columns`: rows parted by commas, their values by bars; weights as in zipf."""
    names = columns.split()
    return [
        (weight, {name: value.strip() for name, value in zip(names, row.split("|"), strict=True)})
        for weight, row in zipf(rows)
    ]


def each_product(crafts: Weighted) -> Weighted:
    """The crafts, each split into its three products in the ratio 3 : 2 : 1."""
    return [
        (weight * share, facts | {"product": product, "products": product + "s"})
        for weight, facts in crafts
        for share, product in zip((3, 2, 1), facts["product"].split(), strict=True)
    ]


# Write "a" always: the next letter makes it "an". So let nothing follow it that sounds unlike its spelling ("hour").
SHE = {"he": "she", "him": "her", "his": "her", "man": "woman"}
HE = {"he": "he", "him": "him", "his": "his", "man": "man"}
WOMEN = "Ada, Clara, Edith, Johanna, Marta, Nell, Sophie, Ursula, Wilma, Yvonne"
MEN = "Arthur, Conrad, Edwin, Jonas, Martin, Nils, Stefan, Ulric, Walter, Yorick"
FACTS: dict[str, Weighted] = {
    "hero": [
        (weight, facts | pronouns)
        for names, pronouns in ((WOMEN, SHE), (MEN, HE))
        for weight, facts in table("name", names)
    ],
    "friend": table("friend", "Bella, Bruno, Dora, David, Frieda, Felix, Hedwig, Henry, Lydia, Lorenz"),
    "relation": table("relation", "cousin, neighbour, teacher, landlord, partner, friend"),
    "colour": table("colour", "blue, red, green, white, yellow, orange, black, brown"),
    "animal": table("animal", "dog, cat, goat, old horse, donkey, owl, raven, goose, parrot, otter"),
    "season": table("season weather", "winter|snow, autumn|rain, spring|mist, summer|dust"),
    "home": table(
        "town water",
        """Harrowmere|lake, Brindlesea|sea, Aldenford|river, Saltwick|sea, Millbeck|river, Ostergate|canal,
        Fernlow|lake, Quillhaven|sea, Tambridge|river, Eskerdale|marsh""",
    ),
    "craft": each_product(
        table(
            "craft material shaped by_tool product",
            """potter | clay | shaped | on the wheel | bowl jug plate,
            weaver | wool | wove | on the loom | blanket rug shawl,
            carpenter | oak | sawed | at the bench | table chair chest,
            blacksmith | iron | hammered | on the anvil | kettle lantern candlestick,
            glassblower | glass | heated | in the furnace | vase goblet bottle,
            saddler | leather | stitched | with a strong needle | saddle belt satchel,
            tailor | linen | cut | with the big scissors | coat jacket apron,
            woodcarver | walnut | carved | with the chisel | puppet flute mask,
            bookbinder | paper | folded | with the bone knife | notebook ledger album,
            stonemason | marble | chipped | with the mallet | fountain statue sundial,
            boatbuilder | cedar | planed | in the dry dock | canoe paddle raft,
            basketmaker | willow | plaited | by hand | basket cradle hamper""",
        )
    ),
}

SIGHTS = """gate, mill, barn, bridge, garden, house, well, orchard, wall, field, inn, tower, cart, chapel, meadow,
    stable, roof, lane, boat, shed, fence, cottage, pond, tree, haystack, hedge, windmill, pier, kiln, signpost"""
VISITORS = """merchant, pilgrim, sailor, farmer, soldier, student, miller, pedlar, musician, shepherd, clerk, hunter,
    painter, fiddler, actor"""
# Past tense throughout. _one is singular and _many plural; the verb agrees with its noun past all that lies between.
GRAMMAR: dict[str, Weighted] = {
    "story": [(1, "<opening> <trade> <order> <events> <closing>")],
    "opening": [
        (4, "{name} lived in {town} , a <quiet> <village> by the {water} , with <pet> ."),
        (3, "in {town} by the {water} , there was a <human> {man} called {name} , who had <pet> ."),
        (2, "there was once a <human> {man} called {name} , who lived with <pet> in {town} by the {water} ."),
    ],
    "quiet": zipf("quiet, small, busy, old, lonely, pretty, windy, ancient, sleepy, poor, charming"),
    "village": zipf("village, town, hamlet, market town, parish"),
    "human": zipf("young, clever, cheerful, patient, shy, proud, gentle, stubborn, odd, brave, elegant"),
    "pet": [(3, "a {animal}"), (2, "a <tame> {animal}")],
    "tame": zipf("lazy, loyal, fat, curious, clumsy, noisy, ill-tempered, greedy, handsome"),
    "trade": [
        (4, "{he} was a {craft} , and {his} {products} were <known> ."),
        (3, "{he} was a {craft} , and <visitors> came from <far_town> to buy {products} ."),
        (2, "like {his} <parent> , {he} was a {craft} and made <good> {products} ."),
    ],
    "known": zipf("known to everyone, as good as any, praised by all, well made, much admired, often copied"),
    "visitor": zipf(VISITORS),
    "visitors": zipf(VISITORS, "s"),
    "parent": zipf("mother, father, uncle, aunt, grandfather, grandmother"),
    "good": zipf("good, fine, simple, strong, beautiful, plain, excellent, elegant, cheap"),
    "far_town": zipf("the city, the coast, the mountains, the capital, the islands, the south, the next valley"),
    "order": [
        (4, "one {season} <part_of_day> {his} {relation} {friend} asked for a {colour} {product} <purpose> ."),
        (3, "late in the {season} , {his} {relation} {friend} <ordered> a {colour} {product} <purpose> ."),
    ],
    "part_of_day": zipf("morning, evening, day, afternoon, night"),
    "ordered": zipf("wanted, ordered, wished for, needed, dreamt of"),
    "purpose": zipf("""for a wedding, for the fair, as a present, for the new house, as a keepsake, for a birthday,
        to show to everyone, for a uncle, for the mayor, to take on a journey"""),
    "events": [(3, "<sentence> <events>"), (1, "<sentence>")],  # four sentences in the mean
    "sentence": [(5, "<event> ."), (4, "<time> , <event> ."), (1, "<event> , and <event> .")],
    "time": zipf("""the next day, in the evening, at dawn, that night, at noon, soon, a week later, on market day,
        after supper, before sunrise, two days later, on Sunday, during a storm, by moonlight"""),
    "event": [
        (5, "<hero> <carried> the {material} <past> <sight>"),
        (2, "<hero> <slowly> {shaped} the {material} <until>"),
        (1, "<hero> <slowly> {shaped} the {material} {by_tool}"),
        (2, "<hero> <slowly> {shaped} the {material} while <rest>"),
        (5, "<rest>"),
        (3, "{weather} <covered> <sight>"),
        (3, "<speaker> <said> that <claim>"),
        (4, "<state>"),
        (3, "a <tired> <visitor> who was <on_the_way> asked for <favour>"),
        (3, "<number> <tired> <visitors> who were <on_the_way> asked for <favour>"),
        (1, "the first {product} was too <faulty> , so {he} <started_again>"),
        (2, "<hero> shared <food> with <companion>"),
    ],
    "hero": [(5, "{he}"), (2, "{name}")],
    "carried": zipf("carried, brought, took, fetched, hauled, dragged"),
    "past": zipf("past, from, to, around, towards, into the shade of"),
    "slowly": zipf("slowly, carefully, quickly, often, gladly, quietly, skilfully, patiently"),
    "until": zipf("until noon, for a while, until midnight, all day, again, without a pause, for two days"),
    "rest": [(1, "the {animal} <slept> <near> <sight>")],
    "slept": zipf("slept, waited, sat, played, rested, stood, hid, ate"),
    "covered": zipf("swept over, fell on, blew across, drifted over, came down on, whirled around"),
    "state": [(3, "<sight_one> was <condition>"), (2, "<sight_many> were <condition>")],
    "condition": zipf("""wet, dark, quiet, cold, hard to see, still there, full of birds, lovely, half hidden,
        covered in moss, bright, silent, warm from the sun, empty, in need of repair"""),
    "sight": [(3, "<sight_one>"), (2, "<sight_many>")],
    "sight_one": [(4, "the <noun>"), (4, "the <look> <noun>"), (3, "the <noun> <near> <sight>")],
    "sight_many": [(4, "the <nouns>"), (4, "the <look> <nouns>"), (3, "the <nouns> <near> <sight>")],
    "noun": zipf(SIGHTS),
    "nouns": zipf(SIGHTS, "s"),
    "look": zipf("old, small, narrow, crooked, large, new, neglected, familiar, humble, tiny, strange, deserted"),
    "near": zipf("near, behind, beside, in front of, opposite, not far from, next to"),
    "speaker": [(3, "{friend}"), (2, "<hero>"), (2, "the <elder>")],
    "elder": zipf("mayor, baker, priest, doctor, innkeeper, judge, postman"),
    "said": zipf("said, thought, heard, knew, believed, swore, was sure"),
    "claim": [(5, "<state>"), (3, "the {colour} {product} would be <fine>"), (1, "<speaker> <said> that <claim>")],
    "fine": zipf("beautiful, ready soon, too expensive, a success, hard to make, the best of all, late"),
    "tired": zipf("tired, hungry, friendly, rich, elderly, talkative, nervous, foreign, impatient, unhappy, young"),
    "on_the_way": [(3, "on the way to <far_town>"), (2, "back from <far_town>"), (1, "new to {town}")],
    "favour": [(3, "<food>"), (2, "a <good> {product}"), (2, "<number> <good> {products}"), (1, "help")],
    "number": zipf("two, three, four, five, six, seven, a dozen"),
    "faulty": zipf("small, heavy, thin, ugly, dull, large, plain, uneven, ordinary"),
    "started_again": zipf("started again, made a second one, sold it cheaply, gave it away, hid it, changed it"),
    "food": zipf("some bread, hot soup, bread and cheese, apple pie, chestnuts, plum cake, porridge, salted fish"),
    "companion": [(3, "{friend}"), (2, "the {animal}"), (2, "the <elder>"), (1, "a <tired> <visitor>")],
    "closing": [
        (4, "at last the {colour} {product} was ready , and {friend} paid <number> crowns ."),
        (3, "when the {colour} {product} was finished , {friend} thanked {him} <warmly> ."),
        (2, "in the end {friend} took the {colour} {product} and gave {him} a <reward> ."),
    ],
    "warmly": zipf("with a smile, warmly, with a song, without a word, again and again, with a hug, in public"),
    "reward": zipf("sack of flour, gold ring, barrel of apples, jar of honey, old clock, umbrella, pair of boots"),
}


def probabilities(alternatives: Weighted) -> list[float]:
    """The alternatives' weights divided by their sum."""
    *_, total = accumulate(weight for weight, _ in alternatives)  # not sum(), which rounds otherwise since Python 3.12
    return [weight / total for weight, _ in alternatives]


def choice_entropy(alternatives: Weighted) -> float:
    """Nats of one choice among the alternatives."""
    return -math.fsum(probability * math.log(probability) for probability in probabilities(alternatives))


def entropies(rules: Rules) -> dict[str, float]:
    """For each nonterminal the entropy of its derivations in nats: the solution of h = e + M h.

    Raises KeyError for a nonterminal without rules, ValueError where the mean length of a derivation is infinite.
    """
    place = {name: number for number, name in enumerate(rules)}
    expected = np.zeros((len(rules), len(rules)))  # M: row x, column y holds the mean number of <y> in x's expansion
    for name, alternatives in rules.items():
        for probability, (_, expansion) in zip(probabilities(alternatives), alternatives, strict=True):
            for symbol in expansion.split():
                if symbol.startswith("<"):
                    expected[place[name], place[symbol[1:-1]]] += probability
    if max(abs(np.linalg.eigvals(expected))) >= 1:
        raise ValueError("the grammar's derivations have no finite mean length")
    own = np.array([choice_entropy(alternatives) for alternatives in rules.values()])
    return dict(zip(rules, np.linalg.solve(np.eye(len(rules)) - expected, own).tolist(), strict=True))


def entropy() -> float:
    """The exact entropy of a document in nats. The newline is included; sure to follow the closing, it adds none."""
    return math.fsum(choice_entropy(alternatives) for alternatives in FACTS.values()) + entropies(GRAMMAR)["story"]


def prepared(alternatives: Weighted) -> list[tuple[float, float, Any]]:
    """For drawing: each alternative's cumulative probability, its nats, and the entry."""
    shares = probabilities(alternatives)
    return [
        (bound, -math.log(share), entry)
        for bound, share, (_, entry) in zip(accumulate(shares), shares, alternatives, strict=True)
    ]


def draw(alternatives: list[tuple[float, float, Any]], source: random.Random) -> tuple[Any, float]:
    """An entry and what it costs in nats."""
    number = source.random()
    for bound, nats, entry in alternatives:
        if number < bound:
            return entry, nats
    return entry, nats  # the last one, whose bound was rounded to below one


def generate(documents: int, seed: int) -> Iterator[tuple[str, float]]:
    """Yields texts, without their newlines, each with its exact negative log-probability in nats.

    A seed gives the same texts on all platforms and Python versions: nothing of `random` is used but random().
    Raises ValueError for a number of documents or a seed below zero (`random` would take -1 for 1).
    """
    if documents < 0 or seed < 0:
        raise ValueError(f"documents and seed must not be negative, got {documents} and {seed}")
    source = random.Random(seed)
    tables = [prepared(alternatives) for alternatives in FACTS.values()]
    rules = {name: prepared(alternatives) for name, alternatives in GRAMMAR.items()}
    for _ in range(documents):
        drawn = [draw(alternatives, source) for alternatives in tables]
        facts = {name: value for entry, _ in drawn for name, value in entry.items()}
        nats = [cost for _, cost in drawn]
        words = []
        pending = ["<story>"]  # symbols to be expanded, the next one last
        while pending:
            symbol = pending.pop()
            if symbol.startswith("<"):
                expansion, cost = draw(rules[symbol[1:-1]], source)
                pending.extend(reversed(expansion.split()))
                nats.append(cost)
            else:
                words.append(facts[symbol[1:-1]] if symbol.startswith("{") else symbol)
        yield render(words), math.fsum(nats)


def render(words: Sequence[str]) -> str:
    """The words as English is spelled: "an" before a vowel, capitals where sentences start, no space before , and ."""
    text = re.sub(r"\ba(?= [aeiou])", "an", " ".join(words))
    text = re.sub(r" (?=[,.])", "", text)
    return re.sub(r"(?:^|(?<=\. ))[a-z]", lambda start: start[0].upper(), text)


@dataclass(frozen=True)
class Corpus:
    """What a written file holds."""

    documents: int
    characters: int  # newlines included
    bytes: int
    entropy_nats: float  # the expectation over all files of as many documents
    negative_log_likelihood_nats: float  # of this file


def write(path: str | os.PathLike, documents: int, seed: int) -> Corpus:
    """Writes a UTF-8 file, one document a line; it appears whole or not at all. Raises as `generate`, and OSError."""
    drawn = list(generate(documents, seed))
    content = "".join(text + "\n" for text, _ in drawn)
    _replace(Path(path), content.encode())
    likelihood = math.fsum(cost for _, cost in drawn)
    return Corpus(documents, len(content), len(content.encode()), documents * entropy(), likelihood)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_all(directory: Path, parameters: Mapping[str, Any]) -> None:
    """Writes train.txt, validation.txt and last, as the mark that both are whole, entropy.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "entropy.json").unlink(missing_ok=True)
    # Derived seeds: neither the two files of a run nor those of runs with different --seed share one.
    seed = parameters["seed"]
    train = write(directory / "train.txt", parameters["documents"], 2 * seed)
    validation = write(directory / "validation.txt", parameters["validation_documents"], 2 * seed + 1)
    report = {"nats_per_document": entropy(), "parameters": parameters}
    report |= {"train.txt": asdict(train), "validation.txt": asdict(validation)}
    _replace(directory / "entropy.json", (json.dumps(report, indent=2) + "\n").encode())


def is_written(directory: Path, parameters: Mapping[str, Any]) -> bool:
    """Whether the directory holds the whole files of these very parameters. Raises OSError where it cannot be read."""
    try:
        report = json.loads((directory / "entropy.json").read_bytes())
        return report["parameters"] == parameters and all(
            (directory / name).stat().st_size == report[name]["bytes"] for name in ("train.txt", "validation.txt")
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main() -> None:
    """The command line: writes the corpus, or says that it is there."""
    parser = Parser(prog="sample_corpus.py", description="Writes a sample corpus whose entropy is known exactly.")
    parser.add_argument("--output_dir", type=Path, required=True, help="for train.txt, validation.txt, entropy.json")
    parser.add_argument("--documents", type=int, default=2000, help="lines of train.txt (default: %(default)s)")
    parser.add_argument("--validation_documents", type=int, default=200, help="of validation.txt (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another corpus (default: %(default)s)")
    parameters = vars(parser.parse_args())
    directory = parameters.pop("output_dir")
    for name, least in (("documents", 1), ("validation_documents", 1), ("seed", 0)):
        if parameters[name] < least:
            parser.error(f"--{name} {parameters[name]}: must be at least {least}")
    # Files of an older grammar are not the same files.
    parameters["grammar_sha256"] = hashlib.sha256(json.dumps([FACTS, GRAMMAR]).encode()).hexdigest()
    try:
        if is_written(directory, parameters):
            print(f"{directory}: the files are there already, nothing to do")
            return
        write_all(directory, parameters)
    except OSError as error:
        parser.error(f"--output_dir {directory}: {error.strerror or error}")
    print(f"{directory}: train.txt and validation.txt written, {entropy():.2f} nats a document (see entropy.json)")


if __name__ == "__main__":
    main()
