"""The pages: figures come from the committed rows, and the README stays short."""

import re
from pathlib import Path

from benchmarks import tables

ROOT = Path(__file__).parents[2]


def test_the_tables_are_those_of_the_committed_rows(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_figure_is_noticed(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text().replace("1.", "9.", 1))
    (tmp_path / "docs" / "results.md").write_text((ROOT / "docs" / "results.md").read_text())
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.main(["--check"]) == 1
    assert capsys.readouterr().out == "README.md is out of date\n"


def test_the_readme_says_what_it_is_worth_before_word_120_and_ends_after_80_lines():
    text = (ROOT / "README.md").read_text()
    first_figure = re.search(r"\d\.\d\dx", text)
    assert len(text[: first_figure.start()].split()) < 120
    assert len(text.splitlines()) <= 80


def test_pages_link_to_files_that_exist():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
