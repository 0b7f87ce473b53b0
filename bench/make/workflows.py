"""Rebuilds workflows/: each template's graph, laid out and saved by the real ComfyUI page, and its picture.

    nox -s bench -- make/workflows.py

The templates are listed in bench/make/templates/jobs.py. Needs Chromium.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this package's parent, not the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rig.pack import ROOT
from rig.page import Page
from rig.server import ComfyServer

from make.templates.files import offer_models
from make.templates.jobs import TEMPLATES, Template
from make.templates.layout import make, numbered
from make.templates.thumbnail import picture

WORKFLOWS = ROOT / "workflows"


def write(page: Page, template: Template) -> dict[str, Any]:
    """Write the workflow and its picture; returns the workflow."""
    workflow = make(page, template)
    path = WORKFLOWS / f"{template.name}.json"
    path.write_text(json.dumps(workflow, indent=2) + "\n", encoding="utf-8")
    thumbnail = picture(page, workflow, template, numbered(template.prompt)[1], path.with_suffix(".jpg"))
    print(f"{path.relative_to(ROOT)}  picture {thumbnail.stat().st_size / 1024:.0f} KB")
    return workflow


def main() -> None:
    """Write all files, and delete those of templates that no longer exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screenshots", type=Path, help="folder for a picture of each whole graph")
    options = parser.parse_args()
    WORKFLOWS.mkdir(exist_ok=True)
    names = {template.name for template in TEMPLATES}
    for path in WORKFLOWS.iterdir():
        if path.stem not in names:
            path.unlink()
    with ComfyServer() as server:
        offer_models(server.base)
        with Page(server.url, size=(2400, 1350)) as page:
            for template in TEMPLATES:
                workflow = write(page, template)
                if options.screenshots:
                    page.load(workflow)
                    page.fit()
                    page.screenshot(options.screenshots / f"{template.name}.png")


if __name__ == "__main__":
    main()
