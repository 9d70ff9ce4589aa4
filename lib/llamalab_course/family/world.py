"""The lab family's little world: tables of facts turned into questions, texts and a fixed split.

The tables lie in ``data/lab/world``: one CSV a kind of entity, every cell ``English / Chinese``, and
two TOML files with the phrasings. Nothing here is random: what is held out is decided by a digest of
the fact itself, so the split is the same on every machine and does not move when entities are added.
"""

import csv
import hashlib
import re
import tomllib
import unicodedata
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

WORLD = Path(__file__).resolve().parents[3] / "data" / "lab" / "world"
TABLES = ("animals", "plants", "foods", "countries", "objects", "professions", "invented")
LANGUAGES = ("en", "zh")
PRONOUN = {"en": "it", "zh": "它"}
_FALSE_CATEGORIES = 3  # how many "no" questions an entity gets


class Text(NamedTuple):
    """The same words in both languages."""

    en: str
    zh: str


class Fact(NamedTuple):
    """One cell of a table: `entity` has `value` for `relation`."""

    table: str
    entity: Text
    relation: str
    value: Text


class Question(NamedTuple):
    """A question with its one right answer; `slot` names the fact and the phrasing it came from."""

    language: str
    group: str  # "fact", "yesno", "newest" or "two-turn"
    slot: str
    text: str
    answer: str
    held_out: bool
    table: str
    entity: str
    history: tuple[tuple[str, str], ...] = ()


class World(NamedTuple):
    """The tables and phrasings as read from disk."""

    facts: tuple[Fact, ...]
    relations: dict
    yesno: dict
    newest: dict
    famous: list[str]
    brands: tuple[Text, ...]
    products: tuple[dict, ...]
    prose: tuple[str, ...]


def pair(cell: str) -> Text:
    """Split a cell ``English / Chinese``; raises ValueError when it is not one."""
    parts = [part.strip() for part in cell.split(" / ")]
    if len(parts) != 2 or not all(parts):
        raise ValueError(f"a cell must read 'English / Chinese', this one is {cell!r}")
    return Text(*parts)


def load_world(folder: Path = WORLD) -> World:
    """Read the world's tables. Raises ValueError for a malformed cell, OSError for a missing file."""
    facts = []
    for table in TABLES:
        for row in _rows(folder, table):
            entity = pair(row.pop("name"))
            values = {relation: pair(cell) for relation, cell in row.items() if cell}
            facts += [Fact(table, entity, *value) for value in values.items()]
    return World(
        **tomllib.loads((folder / "questions.toml").read_text("utf-8")),
        facts=tuple(facts),
        relations=tomllib.loads((folder / "relations.toml").read_text("utf-8")),
        brands=tuple(pair(row["name"]) for row in _rows(folder, "brands")),
        products=tuple(_rows(folder, "products")),
        prose=tuple((folder / "prose.txt").read_text("utf-8").strip().split("\n\n")),
    )


def _rows(folder: Path, table: str) -> list[dict[str, str]]:
    with (folder / f"{table}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def normalise(text: str) -> str:
    """Words and single Chinese characters between spaces: width, case, punctuation, spacing go."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(c if c.isalnum() else " " for c in text)
    return " " + " ".join(re.findall(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+", text)) + " "


def leaks(held_out: Iterable[str], texts: Iterable[str]) -> list[str]:
    """The held-out texts that occur, normalised, as whole words inside any of `texts`."""
    haystack = "\n".join(normalise(text) for text in texts)
    return [text for text in held_out if normalise(text) in haystack]


def unmarked(question: str) -> str:
    """The question without its final mark, as people often type it."""
    return question.rstrip("?？.。")


def _digest(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("|".join(parts).encode()).digest()[:6], "big")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _fill(template: str, x: str, **more: str) -> str:
    text = template.format(x=x, X=_capital(x), **more)
    if x == PRONOUN["en"]:  # "the capital of it" is said "its capital"
        text = re.sub(r"\b[Tt]he (\w+(?: \w+){0,2}) of it\b", r"its \1", text)
    return _capital(text)


def _held_out(texts: list[str], famous: Iterable[str], *slot: str) -> set[int]:
    """Which of the phrasings is held out: a famous one if there is one, else by digest."""
    wanted = {normalise(text) for text in famous}
    known = [i for i, text in enumerate(texts) if normalise(text) in wanted]
    return {known[0] if known else _digest(*slot) % len(texts)}


def _phrased(slot: Sequence[str], texts: list[str], held_out: Container[int], **facts: str):
    """Return a question in each of its phrasings.

    Args:
        slot: the entity, what is asked of it, the language, and what else tells questions apart.
        held_out: the numbers of the phrasings that are held out.
        facts: group, answer and table.
    """
    facts |= {"entity": slot[0], "language": slot[2]}
    return [
        Question(slot="|".join((*slot, str(n))), text=text, held_out=n in held_out, **facts)
        for n, text in enumerate(texts)
    ]


def fact_questions(world: World, fact: Fact, language: str, x: str = "") -> list[Question]:
    """All phrasings of one fact, about `x` (a pronoun) or else the entity by name."""
    i, relation = LANGUAGES.index(language), world.relations[fact.relation]
    name, group = fact.entity[i], "two-turn" if x else "fact"
    texts = [_fill(t, x or name) for t in relation[language]]
    also = [_fill(t, x or name) for t in relation.get(f"{language}_also", ())]
    answer = _fill(relation[f"answer_{language}"], name, v=fact.value[i])
    slot = (fact.entity.en, fact.relation, language, "it" if x else "")
    held_out = _held_out(texts, world.famous, *slot)
    return _phrased(slot, texts + also, held_out, group=group, answer=answer, table=fact.table)


def yesno_questions(world: World, kind: Fact, language: str, x: str = "") -> list[Question]:
    """Is an entity, whose `kind` this is, one of the categories its table is asked about?

    All true ones, and a few false.
    """
    wider = {pair(name): kinds for name, kinds in world.yesno["wider"].items()}
    kinds = {f.value.en: f.value for f in world.facts if f.relation == "kind"}
    categories = {**kinds, **{text.en: text for text in wider}}
    true = {kind.value.en, *(text.en for text, kinds in wider.items() if kind.value.en in kinds)}
    asked = world.yesno["asked"].get(kind.table, ())
    false = sorted(set(asked) - true, key=lambda c: _digest(kind.entity.en, c))[:_FALSE_CATEGORIES]
    i, group, out = LANGUAGES.index(language), "two-turn" if x else "yesno", []
    for category in [c for c in asked if c in true] + false:
        words = {"c": categories[category][i], "k": kind.value[i]}
        texts = [_fill(t, x or kind.entity[i], **words) for t in world.yesno[language]]
        answer = world.yesno[f"{'yes' if category in true else 'no'}_{language}"]
        answer = _fill(answer, kind.entity[i], **words)
        slot = (kind.entity.en, "is " + category, language, "it" if x else "")
        held_out = _held_out(texts, world.famous, *slot)
        out += _phrased(slot, texts, held_out, group=group, answer=answer, table=kind.table)
    return out


def newest_questions(world: World, language: str) -> list[Question]:
    """Every brand with every product; a cell of that grid is held out whole, or not at all."""
    i, out = LANGUAGES.index(language), []
    for brand in world.brands:
        for product in world.products:
            name, one, use = (pair(product[key]) for key in ("name", "one", "use"))
            words = {"b": brand[i], "p": name[i], "one": one[i], "be": product["be"], "use": use[i]}
            texts = [_capital(t.format(**words)) for t in world.newest[language]]
            answer = _capital(world.newest[f"answer_{language}"].format(**words))
            cell, chinese = f"{brand.en} {name.en}", f"{brand.zh}最新的{name.zh}"
            held_out = leaks(world.famous, [chinese]) or _digest("newest", cell) % 5 == 0
            numbers, slot = range(len(texts)) if held_out else (), (cell, "newest", language)
            out += _phrased(slot, texts, numbers, group="newest", answer=answer, table="products")
    return out


def questions(world: World, language: str) -> list[Question]:
    """Every single-turn question of the world in one language, trained and held out."""
    asked = [question for fact in world.facts for question in _about(world, fact, language)]
    return asked + newest_questions(world, language)


def _about(world: World, fact: Fact, language: str, x: str = "") -> list[Question]:
    asked = fact_questions(world, fact, language, x)
    return asked + (yesno_questions(world, fact, language, x) if fact.relation == "kind" else [])


def conversations(world: World, language: str, openings: int = 2) -> list[Question]:
    """Two-turn conversations: the second question says only "it" / 它.

    Each second question (about one fact, in one phrasing) is paired with `openings` first questions
    about the same entity and something else; a first question is always one from training.
    """
    first: dict[str, list[Question]] = {}
    for question in questions(world, language):
        if not question.held_out:
            first.setdefault(question.entity, []).append(question)
    out = []
    for fact in world.facts:
        if fact.table == "professions":  # a doctor is no "it"
            continue
        for second in _about(world, fact, language, PRONOUN[language]):
            about = second.slot.split("|")[1]
            other = [q for q in first[second.entity] if q.slot.split("|")[1] != about]
            for n in range(openings):
                opening = other[_digest(second.slot, str(n)) % len(other)]
                slot = f"{second.slot}|{n}"
                out.append(second._replace(slot=slot, history=((opening.text, opening.answer),)))
    return out


def paragraphs(world: World, language: str, openings: int = 2) -> Iterator[tuple[str, str]]:
    """(table, paragraph): what there is to say about an entity, by name first, then with "it"."""
    i, gap = LANGUAGES.index(language), {"en": " ", "zh": ""}[language]
    about: dict[Text, list[Fact]] = {}
    for fact in world.facts:
        about.setdefault(fact.entity, []).append(fact)
    for entity, facts in about.items():
        pronoun = entity[i] if facts[0].table == "professions" else PRONOUN[language]
        for n in range(openings):
            order = sorted(facts, key=lambda f: _digest(str(n), f.relation, entity.en))
            order = order * 2 if len(order) == 1 else order  # said in both styles
            sentences = []
            for k, fact in enumerate(order):
                style = ("answer_", "say_")[(k + n) % 2]
                template = world.relations[fact.relation][style + language]
                name = pronoun if k else entity[i]
                sentences.append(_fill(template, name, v=fact.value[i]))
            yield facts[0].table, gap.join(sentences)


def chinese_words(world: World) -> list[str]:
    """What Chinese pieces are learnt from: names, values, and the texts between the slots.

    Each stands as often as it is about as common in the questions. Whole sentences would give
    pieces that reach across words ("is-an-ani" "mal"), on which tokenizers part.
    """
    yesno, newest = world.yesno, world.newest
    products = [product[key] for product in world.products for key in ("name", "one", "use")]
    texts_of = [
        (8, [fact.value.zh for fact in world.facts]),
        (30, {fact.entity.zh for fact in world.facts}),
        (30, [brand.zh for brand in world.brands]),
        (30, [pair(cell).zh for cell in products]),
        (100, [pair(name).zh for name in yesno["wider"]]),
        (500, [PRONOUN["zh"]]),
        (300, [yesno["yes_zh"], yesno["no_zh"], *yesno["zh"]]),
        (100, [newest["answer_zh"], *newest["zh"]]),
    ]
    for name, relation in world.relations.items():
        often = sum(fact.relation == name for fact in world.facts)
        texts = [relation["answer_zh"], relation["say_zh"], *relation["zh"]]
        texts_of.append((often, texts + relation.get("zh_also", [])))
    words = []
    for often, texts in texts_of:
        for text in texts:
            words += [word for word in re.split(r"\{\w+\}", text) if word] * often
    return sorted(words)
