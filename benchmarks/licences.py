"""Are the licences of everything that is installed compatible with ours (Apache-2.0)?

    make licences

Reads what pip-licenses found and writes one table. A licence that is not in the list below ends it
in an error: somebody has to read it and decide. Of "A AND B" both must be allowed, of "A OR B"
one. Nothing of these packages is copied into this one; they are imported, or used as tools.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ALLOWED = {
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CNRI-Python",
    "HPND",
    "ISC",
    "MIT",
    "MIT-0",
    "MIT-CMU",
    "PSF-2.0",
    "Unlicense",
    "Zlib",
    # Weak copyleft, by file: it binds who changes or passes on those files, and nobody here does.
    "MPL-2.0",
}
"""May be imported by, and installed beside, a work under Apache-2.0."""

# What authors wrote before there were SPDX names. The first that is found in the text counts.
WORDS = (
    (r"apache", "Apache-2.0"),
    (r"mozilla|\bmpl", "MPL-2.0"),
    (r"\bmit-cmu\b", "MIT-CMU"),
    (r"\bisc\b", "ISC"),
    (r"python software foundation|\bpsfl?\b", "PSF-2.0"),
    (r"bsd-2|2-clause", "BSD-2-Clause"),
    (r"bsd-3|3-clause", "BSD-3-Clause"),
    (r"\bbsd\b", "BSD"),
    (r"\bmit\b", "MIT"),
    (r"unlicense", "Unlicense"),
    (r"\b[al]?gpl|general public", "GPL"),
)


def licence_of(package: dict[str, str]) -> str:
    """An SPDX expression for what a package says of itself; "UNKNOWN" where it says nothing."""
    expression = package["License-Expression"]
    if expression != "UNKNOWN":
        return expression
    metadata = package["License-Metadata"].strip()
    if len(metadata) < 60 and re.search(r" (AND|OR) ", metadata):
        return metadata
    # "A; B" of the classifiers is as vague as it looks: all of them must do.
    classifier = package["License-Classifier"]
    texts = classifier.split(";") if classifier != "UNKNOWN" else [metadata]
    return " AND ".join(dict.fromkeys(_spdx(text) for text in texts))


def _spdx(text: str) -> str:
    words = text[:400].lower()
    return next((name for pattern, name in WORDS if re.search(pattern, words)), "UNKNOWN")


def allowed(expression: str) -> bool:
    """Whether an SPDX expression of AND and OR, with brackets, can be met by allowed licences."""
    inner = re.search(r"\(([^()]*)\)", expression)
    if inner:
        verdict = "MIT" if allowed(inner[1]) else "REFUSED"
        return allowed(expression[: inner.start()] + verdict + expression[inner.end() :])
    return any(
        all(part.strip() in ALLOWED for part in re.split(r"\s+AND\s+", choice))
        for choice in re.split(r"\s+OR\s+", expression)
    )


def table(packages: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """The page, and a line for each package whose licence does not do."""
    rows, refused = [], []
    for package in sorted(packages, key=lambda p: p["Name"].lower()):
        if package["Name"] == "libortho":
            continue
        licence = licence_of(package)
        rows.append(f"| {package['Name']} | {package['Version']} | {licence} |")
        if not allowed(licence):
            refused.append(f"{package['Name']} {package['Version']}: {licence}")
    head = (
        "# Licences\n\nOf every package that `make dev` installs, as the packages say themselves. "
        "Made by `make licences`,\nwhich ends in an error where one is not compatible with "
        "Apache-2.0. None of them is part of this package.\n\n"
        "| Package | Version | Licence |\n|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n", refused


def main() -> None:
    """Read pip-licenses' JSON, write the page, and exit 1 where a licence does not do."""
    found, page = Path(sys.argv[1]), Path(sys.argv[2])
    text, refused = table(json.loads(found.read_text(encoding="utf-8")))
    if refused:
        sys.exit("not known to be compatible with Apache-2.0:\n" + "\n".join(refused))
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
