"""Take pictures of the notebooks as a student sees them: in JupyterLab, wide and narrow, light and dark.

usage: python tooling/walk.py [--run] [--out FOLDER] [NAME …]    (default: all notebooks, into build/walk)

Each notebook becomes pictures NAME-WIDTH-THEME-NUMBER.png, from top to bottom, with its stored outputs. With --run,
*Run All Cells* is clicked first, and nothing else; the exit code is 1 if a cell then shows an error. Needs
requirements-full.txt, and Chromium on PATH.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
WIDTHS = (1000, 390)  # pixels: a laptop, a phone
HEIGHT = 1800  # of a picture
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
SECONDS = 60  # limit for a server or a page on a busy machine
LONGEST = 3600  # seconds for all cells of a notebook
SETTINGS = {
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},  # cells out of sight are drawn, too
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}
SESSION = "window.jupyterapp.shell.currentWidget.context.sessionContext"
CELLS = "window.jupyterapp.shell.currentWidget.content.model.toJSON().cells"
PROMPTS = "[...document.querySelectorAll('.jp-InputPrompt')].map(prompt => prompt.textContent)"


@contextmanager
def serve(home: Path) -> Iterator[tuple[Path, str]]:
    """Start a separate JupyterLab on a free port. Yield its folder of notebooks, and a URL template with the token."""
    folder, runtime, config = home / "copy" / "notebooks", home / "runtime", home / "config" / "labconfig"
    folder.mkdir(parents=True)
    (folder.parent / "data").symlink_to(ROOT / "data")  # notebook 13 reads ../data
    config.mkdir(parents=True)
    (config / "default_setting_overrides.json").write_text(json.dumps(SETTINGS))
    own = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("RUNTIME", "CONFIG", "DATA")}
    place = ["--ip=127.0.0.1", "--ServerApp.port=0", f"--ServerApp.root_dir={folder}"]
    options = [*place, "--no-browser", "--allow-root", "--LabApp.expose_app_in_browser=True"]
    with (home / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env={"QLORA_WORKDIR": str(home / "runs"), **os.environ, **own, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
    try:
        until = time.monotonic() + SECONDS
        while not (descriptions := [path for path in runtime.glob("jpserver-*.json") if path.stat().st_size]):
            assert server.poll() is None, (home / "log").read_text()
            assert time.monotonic() < until, (home / "log").read_text()
            time.sleep(0.2)
        server_info = json.loads(descriptions[0].read_text())
        yield folder, f"{server_info['url']}doc/tree/{{}}?token={server_info['token']}"
    finally:
        server.terminate()  # this also stops its kernels
        server.wait(SECONDS)


@contextmanager
def browse() -> Iterator[Any]:
    """Yield a Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


def run_all(page: Any) -> None:
    """Click *Run All Cells*, once the kernel is there."""
    page.get_by_text("| Idle").wait_for()  # the kernel, in the status bar
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()


def errors(page: Any) -> list[str]:
    """Return the errors that the cells show."""
    outputs = page.evaluate(f"{CELLS}.flatMap(cell => cell.outputs ?? [])")
    return [f"{output['ename']}: {output['evalue']}" for output in outputs if output["output_type"] == "error"]


def pictures(page: Any, out: Path, name: str) -> int:
    """Take pictures of the whole notebook, as often as there are widths and themes. Return their number."""
    taken = 0
    panel = page.locator(".jp-WindowedPanel-outer")
    for theme, title in THEMES.items():
        page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", title)
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": HEIGHT})
            page.wait_for_timeout(1500)  # the style sheet, and the new line breaks
            whole, part = panel.evaluate("panel => [panel.scrollHeight, panel.clientHeight]")
            for number, top in enumerate(range(0, whole, part), 1):
                panel.evaluate("(panel, top) => panel.scrollTo(0, top)", top)
                panel.screenshot(path=out / f"{name}-{width}-{theme}-{number:02}.png")
                taken += 1
    return taken


def walk(names: list[str], out: Path, run: bool) -> int:
    """Open the notebooks one after the other. Return the exit code."""
    failed = False
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home, serve(Path(home)) as (folder, address), browse() as browser:
        for name in names:
            shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", folder)
            page = browser.new_page(viewport={"width": WIDTHS[0], "height": HEIGHT})
            page.set_default_timeout(SECONDS * 1000)
            page.goto(address.format(f"{name}.ipynb"))
            page.locator(".jp-CodeCell").first.wait_for()
            if run:
                run_all(page)
                page.wait_for_function(f"{PROMPTS}.includes('[*]:')")
                page.wait_for_function(f"!{PROMPTS}.includes('[*]:')", timeout=LONGEST * 1000)
            found = errors(page)
            failed |= bool(found)
            print(f"{name}: {pictures(page, out, name)} pictures", *found, sep="\n  ", flush=True)
            page.evaluate(f"{SESSION}.shutdown()")  # or the kernels of all notebooks stay in memory
            page.close()
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description="Take pictures of the notebooks in JupyterLab.")
    parser.add_argument("names", nargs="*", help="notebooks without .ipynb (default: all)")
    parser.add_argument("--run", action="store_true", help="run all cells first")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "walk", help="folder of the pictures")
    options = parser.parse_args()
    if BROWSER is None:
        parser.error(f"no browser on PATH: none of {', '.join(BROWSERS)}. Fix: install Chromium.")
    every = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    return walk(options.names or every, options.out, options.run)


if __name__ == "__main__":
    sys.exit(main())
