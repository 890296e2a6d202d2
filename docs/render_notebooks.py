"""Executes the notebooks and writes what they showed to docs/notebooks: `make notebooks`, or some of them by name.

A page is Markdown with the code, the printed output and pictures, so that it can be read without Jupyter. The notebooks
themselves are not changed: they stay without outputs.
"""

import base64
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

DOCS = Path(__file__).resolve().parent / "notebooks"
NOTEBOOKS = DOCS.parent.parent / "notebooks"
TIMEOUT_SECONDS = 1200  # of a cell
PICTURE_COLOURS = 96  # a palette makes a picture a third as large
COLOURS = re.compile(r"\x1b\[[\d;]*m")  # of a terminal
INLINE = "module://matplotlib_inline.backend_inline"  # pictures become outputs, whatever is set outside


def main(names: list[str]) -> None:
    """Renders notebooks, all of them where none is named."""
    paths = [NOTEBOOKS / f"{name}.ipynb" for name in names] or sorted(NOTEBOOKS.glob("*.ipynb"))
    for path in paths:
        sys.stdout.write(f"{path.name}\n")
        write_page(execute(path), path.stem)


def execute(path: Path) -> NotebookNode:
    """A notebook with its outputs. It runs in an empty folder; an error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT_SECONDS,
            startup_timeout=TIMEOUT_SECONDS,
            kernel_name="python3",
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env={**os.environ, "MPLBACKEND": INLINE})
    return notebook


def write_page(notebook: NotebookNode, name: str) -> None:
    """Writes ``<name>.md``, and its pictures to the folder ``<name>``, which is made anew."""
    pictures = DOCS / name
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir(parents=True)
    head = f"*Made by `make notebooks` from [`notebooks/{name}.ipynb`](../../notebooks/{name}.ipynb).*"
    parts = [head]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(relinked(cell.source))
        else:
            parts.append(f"```python\n{cell.source}\n```")
            parts += [part for output in cell.outputs for part in shown(output, pictures)]
    (DOCS / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def relinked(text: str) -> str:
    """Markdown whose links lead from docs/notebooks to where they led from notebooks/."""
    return text.replace("](../", "](../../").replace(".ipynb)", ".md)")


def shown(output: NotebookNode, pictures: Path) -> Iterator[str]:
    """One output as Markdown: a picture, which is saved, or text. Warnings, which name places of a machine, are not."""
    data = output.get("data", {})
    if output.get("name") == "stderr":
        sys.stderr.write(output.text)
        return
    if "image/png" in data:
        picture = pictures / f"figure-{len(list(pictures.iterdir())) + 1}.png"
        drawn = Image.open(BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
        drawn.quantize(PICTURE_COLOURS).save(picture, optimize=True)
        yield f"![Figure {picture.stem.rpartition('-')[2]}]({pictures.name}/{picture.name})"
    elif text := data.get("text/plain", output.get("text", "")):
        lines = "\n".join(line.rstrip() for line in COLOURS.sub("", text).strip("\n").splitlines())
        yield f"```text\n{lines}\n```"


if __name__ == "__main__":
    main(sys.argv[1:])
