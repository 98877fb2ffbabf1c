"""README.md and docs/*.md: length, links, and commands that the command line takes."""

import ast
import importlib
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest

from gbci_fast.cli import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
MAX_README_WORDS = 1200

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_EXTERNAL = re.compile(r"[a-z]+:")


def prose(path: Path) -> str:
    """A document's text without its code blocks."""
    return _FENCE.sub("", path.read_text(encoding="utf-8"))


def code_blocks(path: Path, language: str) -> list[str]:
    return [code for name, code in _FENCE.findall(path.read_text(encoding="utf-8")) if name == language]


def links(path: Path) -> list[tuple[Path, str]]:
    """Targets of a document's relative links and images: file and anchor, which is "" where there is none."""
    found = []
    for link in _LINK.findall(_SPAN.sub("", prose(path))):
        if not _EXTERNAL.match(link):
            name, _, anchor = unquote(link).partition("#")
            found.append(((path.parent / name).resolve() if name else path, anchor))
    return found


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings, where no two headings are the same."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def block_commands(path: Path) -> list[list[str]]:
    """Arguments of every `gbci-fast` command in a document's shell blocks; placeholders (INPUT) count as paths."""
    lines = "\n".join(code_blocks(path, "bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line[:1] == ["gbci-fast"]]


def span_commands(path: Path) -> list[list[str]]:
    """Arguments of every command named in running text, as `gbci-fast COMMAND …` or as `COMMAND ARGUMENT …`."""
    found = []
    for span in _SPAN.findall(prose(path)):
        words = span.split()
        if "gbci-fast" in words:
            words = words[words.index("gbci-fast") + 1 :]
        elif len(words) == 1 or words[0] not in COMMANDS:
            continue
        if words:
            found.append(words)
    return found


def make_targets(path: Path) -> list[str]:
    return re.findall(r"\bmake +([\w-]+)", "\n".join([*_SPAN.findall(prose(path)), *code_blocks(path, "bash")]))


def documents_with(read) -> list[pytest.param]:
    return [pytest.param(item, id=f"{path.name}: {item}") for path in DOCUMENTS for item in read(path)]


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= MAX_README_WORDS


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(path):
    dead = [str(target) for target, _ in links(path) if not target.exists()]
    assert dead == []
    lost = [f"{target}#{anchor}" for target, anchor in links(path) if anchor and anchor not in anchors(target)]
    assert lost == []


def test_every_page_is_linked():
    """From the README, or from a page that is linked there; pictures, too."""
    linked = {target for target, _ in links(README)}
    for path in linked & set(DOCUMENTS):
        linked |= {target for target, _ in links(path)}
    files = {path for path in (ROOT / "docs").rglob("*") if path.is_file()}
    assert files - linked == set()


@pytest.mark.parametrize("command", documents_with(lambda path: map(" ".join, block_commands(path))))
def test_commands_in_blocks_parse(command, capsys):
    try:
        build_parser().parse_args(command.split())
    except SystemExit:
        pytest.fail(f"gbci-fast {command}: {capsys.readouterr().err}")


@pytest.mark.parametrize("command", documents_with(lambda path: map(" ".join, span_commands(path))))
def test_commands_in_text_exist_with_their_options(command, capsys):
    """They need not be whole, so their options are looked up in the help of the command."""
    words = command.split()
    names = [word for word in words[:2] if word.islower() and word.isalpha()]
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([*names, "--help"])
    assert ended.value.code == 0, capsys.readouterr().err
    known = re.findall(r"--[\w-]+", capsys.readouterr().out)
    assert [word for word in words if word.startswith("--") and word not in known] == []


def test_the_commands_of_the_documents_are_found():
    """As many as there are at least: a change of style must not hide them from the tests above."""
    assert sum(len(block_commands(path)) for path in DOCUMENTS) >= 12
    assert sum(len(span_commands(path)) for path in DOCUMENTS) >= 30


@pytest.mark.parametrize("target", documents_with(make_targets))
def test_make_targets_exist(target):
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("code", [code for path in DOCUMENTS for code in code_blocks(path, "python")])
def test_names_imported_in_snippets_exist(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("gbci_fast"):
            module = importlib.import_module(node.module)
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []
