"""Text that is found on any machine, a paragraph at a time and none of them twice: what text_to_blocks reads.

Texts of ../shared/data (where they are absent the sample corpus), manual pages, documentation of installed packages,
docstrings and change logs.
"""

import gzip
import html.parser
import json
import random
import re
import site
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import xxhash

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
DOCUMENTS, MANUALS = Path("/usr/share/doc"), Path("/usr/share/man")
SHORTEST = 40  # characters of a paragraph: shorter ones are headings, cells of tables, rules
LARGEST_FILE = 20_000_000  # bytes
MARKUP = re.compile(r"\\f[BIRPC]|\\f\(..|\\m\[\w*\]|\\[&,/|^%]|\\s[-+]?\d")
DOCSTRING = re.compile(r':\n\s*[rR]?"""(.+?)"""', re.DOTALL)
ENTRY = re.compile(r"\n\s*\n|\n\s*(?=[*-] )")
CHARACTERS = {
    r"\-": "-",
    r"\(aq": "'",
    r"\(dq": '"',
    r"\(co": "©",
    r"\(bu": "•",
    r"\(em": "—",
    r"\(en": "–",
    r"\e": "\\",
}


def write(file: Path, megabytes: float) -> tuple[int, dict[str, int]]:
    """(bytes written, bytes by kind): paragraphs in turn, each a line, until the file has its size or the text ends."""
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    with file.open("w", encoding="utf-8") as output:
        for kind, paragraph in found():
            line = " ".join(paragraph.split())
            key = xxhash.xxh3_64_intdigest(line.encode(errors="replace"))
            if len(line) < SHORTEST or key in seen or not line.isprintable():
                continue
            seen.add(key)
            sizes[kind] += output.write(line + "\n") + len(line.encode()) - len(line)
            if sizes.total() >= megabytes * 1e6:
                break
    return sizes.total(), dict(sizes)


def found() -> Iterator[tuple[str, str]]:
    """(kind, paragraph): prose first, then manual pages, documentation and docstrings in turns, change logs at the end.

    White space in a paragraph means nothing.
    """
    prose = shared() if SHARED.is_dir() else sample()
    yield from (("articles and speeches", paragraph) for paragraph in prose)
    packages = [Path(sysconfig.get_path("stdlib")), *map(Path, site.getsitepackages())]
    kinds = {
        "manual pages": parts(manual_page, [MANUALS]),
        "documentation": parts(documentation, [DOCUMENTS, *packages]),
        "docstrings": parts(docstrings, packages),
    }
    sizes = dict.fromkeys(kinds, 0)
    while sizes:
        kind = min(sizes, key=sizes.__getitem__)
        paragraph = next(kinds[kind], None)
        if paragraph is None:
            del sizes[kind]
            continue
        sizes[kind] += len(paragraph)
        yield kind, paragraph
    yield from (("change logs", paragraph) for paragraph in parts(change_log, [DOCUMENTS]))


def parts(read_paragraphs: Callable[[Path], Iterable[str]], folders: list[Path]) -> Iterator[str]:
    """Those of all files below, in random order: neighbours are often alike. Links are left out."""
    files = [file for folder in folders for file in sorted(folder.rglob("*"))]
    random.Random(0).shuffle(files)
    for file in files:
        if file.is_file() and not file.is_symlink():
            yield from read_paragraphs(file)


# ---- kinds ----
def shared() -> Iterator[str]:
    for name in ("wikitext-2-raw-v1/wiki.valid.raw", "wikitext-2-raw-v1/wiki.test.raw", "wiki_demo.txt"):
        if (SHARED / name).is_file():
            yield from (SHARED / name).read_text(encoding="utf-8").split("\n")
    for name in ("c4_demo.jsonl", "state_union.jsonl"):
        if (SHARED / name).is_file():
            for row in (SHARED / name).read_text(encoding="utf-8").splitlines():
                yield from json.loads(row)["text"].split("\n")


def sample() -> Iterator[str]:
    from utils import sample_corpus

    with tempfile.TemporaryDirectory() as folder:
        sample_corpus.write(Path(folder) / "a.txt", documents=20_000, seed=1)
        yield from (Path(folder) / "a.txt").read_text(encoding="utf-8").split("\n")


def manual_page(file: Path) -> Iterator[str]:
    """The paragraphs of a page in any language, without what troff is told."""
    text = read(file)
    if text.startswith(".so "):  # another page's name only
        return
    text = MARKUP.sub("", text)
    for written, character in CHARACTERS.items():
        text = text.replace(written, character)
    lines = (
        "" if line.startswith((".", "'", '\\"')) and not is_inline(line) else inline(line) for line in text.split("\n")
    )
    # Letters that troff puts together are few; a paragraph with one is left out.
    yield from (paragraph for paragraph in "\n".join(lines).split("\n\n") if "\\(" not in paragraph)


def is_inline(line: str) -> bool:
    """Whether a line of troff sets words of a sentence in another type."""
    return line.startswith((".B ", ".I ", ".BR ", ".IR ", ".BI ", ".RB ", ".RI ", ".IB "))


def inline(line: str) -> str:
    return line.split(" ", 1)[1].replace('"', "") if is_inline(line) else line


def documentation(file: Path) -> Iterable[str]:
    name = file.name.removesuffix(".gz").lower()
    if name.endswith((".html", ".htm")):
        return of_html(read(file))
    if name.endswith((".rst", ".md", ".txt")) or name in ("metadata", "readme", "copyright", "faq", "news"):
        return read(file).replace("\r", "").split("\n\n")
    return []


def docstrings(file: Path) -> Iterator[str]:
    """What stands in triple quotes behind a line that ends in a colon."""
    if file.suffix == ".py":
        for text in DOCSTRING.findall(read(file)):
            yield from text.split("\n\n")


def change_log(file: Path) -> Iterable[str]:
    """Its entries."""
    name = file.name.lower()
    return ENTRY.split(read(file)) if name.startswith(("changelog", "news")) else []


def read(file: Path) -> str:
    """The text of a file, also one that is compressed; "" if it is none."""
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as source:
            return source.read(LARGEST_FILE).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError):
        return ""


class _Text(html.parser.HTMLParser):
    """Collects what stands between block tags."""

    BLOCKS = ("p", "li", "td", "div", "dd", "dt", "h1", "h2", "h3", "h4", "br", "pre", "title", "tr")

    def __init__(self):
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.hidden += tag in ("script", "style")
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def of_html(page: str) -> list[str]:
    parser = _Text()
    parser.feed(page)
    return "".join(parser.parts).split("\n\n")
