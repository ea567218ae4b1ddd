"""What the README says exists, exists. Its commands are run in tests/rehearsal/test_documents.py."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_paths_in_the_map_exist():
    rows = re.findall(r"^\| (`[^|]*) \|", README.split("## Map of the code")[1], flags=re.M)
    paths = [p for row in rows for p in re.findall(r"`([^`]+)`", row)]
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path


def test_links_between_documents_lead_somewhere():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
