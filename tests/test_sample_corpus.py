"""utils/sample_corpus.py: the entropy, the proof that no text has two derivations, the English and the command line."""

import functools
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest

from utils import sample_corpus
from utils.sample_corpus import FACTS, GRAMMAR, entropies, entropy, generate, probabilities, write

ROOT = Path(__file__).resolve().parent.parent
TABLE_OF = {name: table for table, entries in FACTS.items() for _, facts in entries for name in facts}


def folded(text: str) -> tuple[str, ...]:
    """The words of a text or expansion, with what `render` does undone."""
    words = re.findall(r"<\w+>|{\w+}|[\w-]+|[,.]", text)
    return tuple(word if word[0] in "<{" else "a" if word.lower() == "an" else word.lower() for word in words)


# An independent parser: the number of derivations of a text, and their probability.

SHARES = {name: [weight / sum(w for w, _ in rules) for weight, _ in rules] for name, rules in GRAMMAR.items()}
EXPANSIONS = {name: [folded(expansion) for _, expansion in rules] for name, rules in GRAMMAR.items()}


def count_derivations(text: str) -> tuple[int, float]:
    """Dynamic programming over (symbol, position, facts known); all facts that agree with the text are followed."""
    words = folded(text)

    @functools.cache
    def ends(symbol: str, position: int, known: frozenset) -> dict:
        """{(end, facts known then): (derivations, probability)} of `symbol` from `position`."""
        found = {}
        if symbol[0] == "<":
            name = symbol[1:-1]
            for share, expansion in zip(SHARES[name], EXPANSIONS[name], strict=True):
                for key, (count, probability) in sequence(expansion, position, known).items():
                    total, sum_ = found.get(key, (0, 0.0))
                    found[key] = (total + count, sum_ + share * probability)
        elif symbol[0] == "{":
            table = TABLE_OF[symbol[1:-1]]
            entries, chosen = FACTS[table], dict(known).get(table)
            total_weight = sum(weight for weight, _ in entries)
            for number, (weight, facts) in enumerate(entries):
                value = folded(facts[symbol[1:-1]])
                if chosen in (None, number) and words[position : position + len(value)] == value:
                    share = weight / total_weight if chosen is None else 1.0
                    found[position + len(value), known | {(table, number)}] = (1, share)
        elif words[position : position + 1] == (symbol,):
            found[position + 1, known] = (1, 1.0)
        return found

    def sequence(symbols: tuple[str, ...], position: int, known: frozenset) -> dict:
        partial = {(position, known): (1, 1.0)}
        for symbol in symbols:
            following = {}
            for (middle, facts), (count, probability) in partial.items():
                for key, (count_here, probability_here) in ends(symbol, middle, facts).items():
                    total, sum_ = following.get(key, (0, 0.0))
                    following[key] = (total + count * count_here, sum_ + probability * probability_here)
            partial = following
        return partial

    derivations, likelihood = 0, 0.0
    for (end, known), (count, probability) in ends("<story>", 0, frozenset()).items():
        if end == len(words):
            # A fact that the text leaves open is a derivation for each of its entries.
            untold = math.prod(len(entries) for table, entries in FACTS.items() if table not in dict(known))
            derivations += count * untold
            likelihood += probability
    return derivations, likelihood


def test_each_generated_text_has_one_derivation_of_the_stated_probability() -> None:
    for text, nats in generate(200, seed=11):
        derivations, likelihood = count_derivations(text)
        assert derivations == 1, text
        assert -math.log(likelihood) == pytest.approx(nats, rel=1e-9), text


def test_the_parser_counts_every_derivation(monkeypatch: pytest.MonkeyPatch) -> None:
    text, _ = next(generate(1, seed=11))
    assert count_derivations(text.replace(" a ", " the ", 1)) == (0, 0.0)
    monkeypatch.setitem(EXPANSIONS, "story", EXPANSIONS["story"] * 2)
    monkeypatch.setitem(SHARES, "story", [0.5, 0.5])
    assert count_derivations(text)[0] == 2
    # Two lists of sentences in a row: as many splits as there are gaps between sentences.
    monkeypatch.setitem(EXPANSIONS, "story", [folded("<opening> <trade> <order> <events> <events> <closing>")])
    monkeypatch.setitem(SHARES, "story", [1.0])
    gaps = [text.count(".") - 4 - 1 for text, _ in generate(10, seed=11)]
    assert [count_derivations(text)[0] for text, _ in generate(10, seed=11)] == gaps
    assert max(gaps) > 2
    # The first sentence tells of hero, home and animal; the other tables may say anything.
    monkeypatch.setitem(EXPANSIONS, "story", [folded("<opening>")])
    untold = [len(entries) for table, entries in FACTS.items() if table not in ("hero", "home", "animal")]
    assert count_derivations(text[: text.index(".") + 1])[0] == math.prod(untold)


# The proof for all texts. Every {fact} is free here to take any of its values anywhere, which only adds derivations.


def two_derivations(rules: dict[str, list[str]], start: str = "story") -> bool:
    """Whether two derivations of `start` end in the same words; with right recursion the search is finite.

    A state of a derivation from left to right is the stack of symbols yet to be expanded. Two derivations that part and
    have read the same words are a pair of stacks; if a pair becomes equal, both can go on alike.
    """
    bodies = {name: [folded(rule) for rule in alternatives] for name, alternatives in rules.items()}
    for name, table in TABLE_OF.items():
        bodies[f"fact {name}"] = sorted({folded(facts[name]) for _, facts in FACTS[table]})

    @functools.cache
    def steps(stack: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
        """The next word and the stack after it, once for each way to get there."""
        if not stack:
            return []
        first, rest = stack[0], stack[1:]
        if first[0] not in "<{":
            return [(first, rest)]
        assert len(stack) < 30, "the recursion is not to the right only"
        name = first[1:-1] if first[0] == "<" else f"fact {first[1:-1]}"
        return [step for body in bodies[name] for step in steps(body + rest)]

    begin = (f"<{start}>",)
    pending, seen = [(begin, begin)], {(begin, begin)}
    while pending:
        left, right = pending.pop()
        pairs = combinations(steps(left), 2) if left == right else product(steps(left), steps(right))
        together = [(one, other) for (word, one), (other_word, other) in pairs if word == other_word]
        if any(one == other for one, other in together):
            return True
        if left == right:
            together += [(stack, stack) for _, stack in steps(left)]
        for pair in together:
            if pair not in seen:
                seen.add(pair)
                pending.append(pair)
    return False


def test_no_two_derivations_of_the_grammar_spell_the_same() -> None:
    assert not two_derivations({name: [rule for _, rule in rules] for name, rules in GRAMMAR.items()})


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"story": ["a <x>", "a b c"], "x": ["b c", "c"]}, True),
        ({"story": ["a <x> d", "a b c e"], "x": ["b c", "c"]}, False),
        ({"story": ["<x> , <x>"], "x": ["a", "a , <x>"]}, True),  # "a, a, a" parts in two places
        ({"story": ["<x> . <x>"], "x": ["a", "a , <x>"]}, False),
        ({"story": ["<x>"], "x": ["a", "b", "a"]}, True),
        ({"story": ["once <x> ."], "x": ["a <y>", "b"], "y": ["c", "c"]}, True),  # alike for some words first
        ({"story": ["once <x> ."], "x": ["a <y>", "b"], "y": ["c", "d"]}, False),
    ],
)
def test_the_proof_tells_ambiguous_grammars(rules: dict[str, list[str]], expected: bool) -> None:
    assert two_derivations(rules) is expected


def test_every_story_tells_each_table_s_entry() -> None:
    told = {name: set(TABLE_OF) for name in GRAMMAR}  # the facts that each derivation of a nonterminal holds
    while True:
        before = dict(told)
        for name, expansions in EXPANSIONS.items():
            in_each = [
                set().union(*(told[s[1:-1]] if s[0] == "<" else {s[1:-1]} for s in expansion if s[0] in "<{"))
                for expansion in expansions
            ]
            told[name] = set.intersection(*in_each)
        if told == before:
            break
    for table, entries in FACTS.items():
        tellings = [tuple(facts[name] for name in sorted(told["story"] & set(facts))) for _, facts in entries]
        assert len(set(tellings)) == len(entries), table


def test_facts_have_the_same_columns_and_no_name_twice() -> None:
    for entries in FACTS.values():
        assert len({tuple(sorted(facts)) for _, facts in entries}) == 1
    assert len(TABLE_OF) == sum(len(entries[0][1]) for entries in FACTS.values())


def test_all_nonterminals_and_facts_are_there_and_used() -> None:
    symbols = {symbol for rules in EXPANSIONS.values() for rule in rules for symbol in rule if symbol[0] in "<{"}
    assert symbols == {f"<{name}>" for name in GRAMMAR if name != "story"} | {f"{{{name}}}" for name in TABLE_OF}


# The entropy.


def test_entropy_of_small_grammars_by_hand() -> None:
    # Heads until the first tails: two tosses in the mean.
    assert entropies({"s": [(1, "a <s>"), (1, "b")]})["s"] == pytest.approx(2 * math.log(2), rel=1e-12)
    quarter = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    both = entropies({"s": [(3, "<x> and <x>"), (1, "none")], "x": [(1, "p"), (1, "q")]})
    assert both["s"] == pytest.approx(quarter + 0.75 * 2 * math.log(2), rel=1e-12)
    assert both["x"] == pytest.approx(math.log(2), rel=1e-12)
    # h[s] = c + h[t] / 3 and h[t] = 2 h[s], so h[s] = 3 c.
    third = -math.log(1 / 3) / 3 - 2 / 3 * math.log(2 / 3)
    loop = entropies({"s": [(1, "a <t>"), (2, "b")], "t": [(5, "<s> <s>")]})
    assert loop == pytest.approx({"s": 3 * third, "t": 6 * third}, rel=1e-12)


def test_entropy_of_a_grammar_that_never_ends_is_an_error() -> None:
    with pytest.raises(ValueError, match="finite mean length"):
        entropies({"s": [(2, "<s> <s>"), (1, "b")]})
    with pytest.raises(KeyError):
        entropies({"s": [(1, "<t>")]})


def test_entropy_is_the_mean_negative_log_probability() -> None:
    nats = [cost for _, cost in generate(20_000, seed=3)]
    error = statistics.stdev(nats) / math.sqrt(len(nats))
    assert error < 0.01 * entropy()  # else the next line would say little
    assert abs(statistics.fmean(nats) - entropy()) < 4 * error


def test_words_cost_what_a_small_model_can_learn() -> None:
    texts = [text for text, _ in generate(2000, seed=4)]
    words = statistics.fmean(len(text.split()) for text in texts)
    assert 1.0 < entropy() / words < 1.6
    assert 300 < len({word for text in texts for word in folded(text)}) < 800


@pytest.mark.parametrize("rules", [*FACTS.values(), *GRAMMAR.values()], ids=[*FACTS, *GRAMMAR])
def test_probabilities_sum_to_one(rules: sample_corpus.Weighted) -> None:
    shares = probabilities(rules)
    assert math.fsum(shares) == pytest.approx(1, abs=1e-12)
    assert all(share > 0 for share in shares)
    assert [share / shares[0] for share in shares] == pytest.approx([weight / rules[0][0] for weight, _ in rules])


# The texts.


def test_a_seed_always_gives_the_same_texts() -> None:
    """A fixed hash: on all platforms and versions, and for anyone who compares losses. A changed grammar changes it."""
    text = "\n".join(text for text, _ in generate(100, seed=0))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "d2f4017537739840b305f5a935236a6252513aebf52953cd0b880b00d3512790"
    assert list(generate(5, seed=1)) == list(generate(9, seed=1))[:5]
    assert list(generate(5, seed=1)) != list(generate(5, seed=2))


@pytest.mark.parametrize(("documents", "seed"), [(-1, 0), (1, -1)])
def test_negative_numbers_are_refused(documents: int, seed: int) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        list(generate(documents, seed))


def test_english_on_the_surface() -> None:
    pronouns = {"woman": {"he", "him", "his", "man"}, "man": {"she", "her", "woman"}}
    hero = {facts["name"]: facts["man"] for _, facts in FACTS["hero"]}
    for text, _ in generate(1000, seed=7):
        assert re.fullmatch(r"[A-Za-z ,.-]+", text), text
        assert text.endswith(".") and "  " not in text and text == text.strip(), text
        assert not re.search(r" [,.]|[,.][^ ]|[,.] ?[,.]", text), text
        assert all(sentence[0].isupper() for sentence in text.split(". ")), text
        assert not re.search(r"\b[Aa] [AEIOUaeiou]|\b[Aa]n [^aeiou]", text), text
        assert not re.search(r"\b[Aa]n? (hour|hono|hones|heir|one|once|us[eu]|uni[^nm]|eu|ewe)", text), text
        assert not re.search(r"\b(\w+) \1\b", text), text
        # Without a phrase in between, the noun before the verb tells its number.
        for noun, verb in re.findall(r"(?:^|[.,] |and |that |while )[Tt]he (?:\w+ )?(\w+) (was|were)\b", text):
            assert (verb == "were") == noun.endswith("s"), text
        gender = next(hero[word] for word in re.findall(r"\w+", text) if word in hero)
        assert not pronouns[gender] & set(re.findall(r"\w+", text.lower())), text


def test_verbs_agree_across_phrases() -> None:
    """In "the gates near the mill were wet" the verb is the first noun's, not the nearest's."""
    nouns = "|".join(noun for _, noun in GRAMMAR["noun"])
    look = "|".join(word for _, word in GRAMMAR["look"])
    near = "|".join(word for _, word in GRAMMAR["near"])
    sight = rf"[Tt]he (?:(?:{look}) )?(?:{nouns})(s?)"
    subject = re.compile(rf"(?:^|[.,] |and |that ){sight}((?: (?:{near}) {sight})+) (was|were)\b")
    seen = set()
    for text, _ in generate(1000, seed=8):
        for match in subject.finditer(text):
            first, nearest, verb = match[1], match[3], match[match.lastindex]
            assert verb == ("were" if first else "was"), match[0]
            seen.add((first, nearest))
    assert len(seen) == 4  # with the nearest noun alike and unlike, in both numbers


# Files and the command line.


def test_write_returns_what_it_wrote(tmp_path: Path) -> None:
    corpus = write(tmp_path / "some.txt", 30, seed=5)
    content = (tmp_path / "some.txt").read_bytes()
    drawn = list(generate(30, seed=5))
    assert content.decode("utf-8") == "".join(text + "\n" for text, _ in drawn)
    assert (corpus.documents, corpus.bytes, corpus.characters) == (30, len(content), len(content.decode("utf-8")))
    assert corpus.entropy_nats == pytest.approx(30 * entropy())
    assert corpus.negative_log_likelihood_nats == pytest.approx(sum(nats for _, nats in drawn))


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.txt"
    path.write_text("old")

    def fail(source: object, target: object) -> None:
        assert Path(source).stat().st_size > 1000  # whole before it gets its name
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write(path, 30, seed=5)
    assert [file.name for file in tmp_path.iterdir()] == ["some.txt"]
    assert path.read_text() == "old"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "utils.sample_corpus", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}


def test_command_line_with_its_defaults(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "corpus"
    first = command("--output_dir", folder)
    assert (first.returncode, first.stderr) == (0, "")
    assert f"{entropy():.2f} nats" in first.stdout
    written = state(folder)
    assert set(written) == {"train.txt", "validation.txt", "entropy.json"}

    report = json.loads(written["entropy.json"][1])
    assert report["nats_per_document"] == pytest.approx(entropy())
    lines = {}
    for name, low, high in (("train.txt", 1.0e6, 1.5e6), ("validation.txt", 0.8e5, 1.5e5)):
        content, told = written[name][1], report[name]
        lines[name] = content.decode("utf-8").splitlines()
        assert low < len(content) == told["bytes"] < high
        assert told["documents"] == len(lines[name])
        assert told["characters"] == len(content.decode("utf-8"))
        assert told["entropy_nats"] == pytest.approx(len(lines[name]) * entropy())
        # The file's own cost, not its expectation; a document's standard deviation is below its mean.
        spread = 4 * math.sqrt(told["documents"]) * entropy()
        assert 0 < abs(told["negative_log_likelihood_nats"] - told["entropy_nats"]) < spread
    assert not set(lines["train.txt"]) & set(lines["validation.txt"])

    second = command("--output_dir", folder)
    assert second.returncode == 0 and "nothing to do" in second.stdout
    assert state(folder) == written


def test_command_line_writes_anew_what_is_missing_cut_short_or_different(tmp_path: Path) -> None:
    small = ("--output_dir", tmp_path, "--documents", 20, "--validation_documents", 10)
    assert command(*small).returncode == 0
    expected = {name: content for name, (_, content) in state(tmp_path).items()}
    train, report = tmp_path / "train.txt", tmp_path / "entropy.json"
    changed = json.loads(report.read_text())
    changed["parameters"]["grammar_sha256"] = "older"
    for spoil in (
        train.unlink,
        lambda: train.write_bytes(train.read_bytes()[:-1]),
        lambda: report.write_text("{"),
        lambda: report.write_text("[]"),
        lambda: report.write_text(json.dumps(changed)),
    ):
        spoil()
        assert "written" in command(*small).stdout
        assert {name: content for name, (_, content) in state(tmp_path).items()} == expected
    assert "written" in command(*small, "--seed", 1).stdout
    files = {name: content for name, (_, content) in state(tmp_path).items()}
    assert all(files[name] != expected[name] for name in expected)
    assert not set(files["train.txt"].splitlines()) & set(expected["validation.txt"].splitlines())


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["--documents", "0"], "--documents 0"),
        (["--validation_documents", "-3"], "--validation_documents -3"),
        (["--seed", "-1"], "--seed -1"),
        (["--documents", "many"], "many"),
        (["--unknown"], "--unknown"),
    ],
)
def test_bad_input_ends_with_one_line(tmp_path: Path, arguments: list[str], mention: str) -> None:
    done = command("--output_dir", tmp_path / "corpus", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and mention in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        done = command("--output_dir", folder)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1 and str(folder) in done.stderr
    assert (tmp_path / "file").read_text() == "mine"
    assert "--output_dir" in command().stderr
