"""What the documents name exists."""

import re
from pathlib import Path

import pytest

from runtime.config import preset_names
from tools import cli

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "quickset" / "README.md"])
ROOMS = (
    "curation",
    "pretrain",
    "distill",
    "evaluation",
    "imaging",
    "runtime",
    "tools",
    "configs",
    "tests",
    "benchmarks",
    "docs",
    "quickset",
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_exist(page):
    text = page.read_text()
    named = set(re.findall(r"`((?:" + "|".join(ROOMS) + r")/[\w./-]+\.(?:py|yaml|html|csv|md))`", text))
    links = {link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if not link.startswith("http")}
    assert [name for name in named if not (ROOT / name).is_file()] == []
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_ones_that_the_command_line_knows(page):
    """Every `troodon ...` line of a code block parses, and its preset exists."""
    for block in re.findall(r"```\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for line in block.splitlines():
            command = re.match(r"(?:\S*/)?troodon (.*)", line.strip())
            if command:
                args = cli.parse(command[1].partition("  #")[0].split())
                config = getattr(args, "config", None)
                assert config is None or config in preset_names() or config.endswith(".yaml")


def test_anchors_of_a_page_exist():
    text = (ROOT / "docs" / "formats.md").read_text()
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= headings
