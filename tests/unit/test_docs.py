"""README and docs hold what a reader would try: links lead somewhere, tables name what there is."""

import argparse
import re
from pathlib import Path

import pytest

from outlast.errors import Exit
from outlast.launcher.arguments import parser

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^][]+\]\(([^()\s]+)\)")


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(heading: str, column: str) -> list[str]:
    """First cells of the README's table that begins with `column`, below `heading`."""
    section = (REPOSITORY / "README.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = section.partition(f"| {column} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [row.split("|")[1].strip() for row in rows]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {path}, which is not there"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}: no such heading"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in LINK.findall((REPOSITORY / "README.md").read_text())}
    assert linked >= {f"docs/{page.name}" for page in PAGES[1:]}


def test_the_commands_are_the_command_lines_own() -> None:
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(table("Commands and exit codes", "command")) == {f"`outlast {name}`" for name in commands.choices}


def test_the_exit_codes_are_all_there_are() -> None:
    assert [int(code) for code in table("Commands and exit codes", "exit code")] == sorted(map(int, Exit))


def test_the_batch_script_is_the_tested_one() -> None:
    """`tests/slurm/test_own_script.py` submits that file."""
    script = (REPOSITORY / "slurm" / "script.sbatch").read_text()
    shown = "".join(line for line in script.splitlines(keepends=True) if not re.match(r"#([^!S]|$)", line))
    assert shown in (REPOSITORY / "README.md").read_text()
