"""Texts for docs/caches.md: those that prices are fitted on, and others of another source, from what is installed.

python bench/cache_texts.py FOLDER

FOLDER/calibration.jsonl: Python's help topics and sources of its standard library, in turn. FOLDER/other.jsonl: the
descriptions (READMEs) of the installed packages. A row is long enough for a window of 1,024 tokens of most tokenizers;
rows are spread evenly over their sources.
"""

import argparse
import json
import sysconfig
from importlib.metadata import distributions
from pathlib import Path
from pydoc_data.topics import topics

ROWS = 64  # of each source
LENGTH = 8000  # characters of a row


def spread(text):
    """Return rows that begin at equal distances."""
    step = max(1, len(text) // ROWS)
    return [text[start : start + LENGTH] for start in range(0, step * ROWS, step)]


def library():
    """Return the sources of the standard library, without its packages."""
    folder = Path(sysconfig.get_path("stdlib"))
    return "\n\n".join(path.read_text(errors="ignore") for path in sorted(folder.glob("*.py")))


def descriptions():
    """Return the descriptions of the installed packages."""
    found = {x.metadata["Name"]: x.metadata.get_payload() for x in distributions()}
    return "\n\n".join(str(found[name]) for name in sorted(found) if len(str(found[name])) > 2000)


def write(path, rows):
    """Write rows of text."""
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows, {sum(map(len, rows)):,} characters")


def main():
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    sources = spread("\n\n".join(topics[name] for name in sorted(topics))), spread(library())
    write(folder / "calibration.jsonl", [row for pair in zip(*sources, strict=True) for row in pair])
    write(folder / "other.jsonl", spread(descriptions()))


if __name__ == "__main__":
    main()
