"""JupyterLab in a real browser: a release opens and runs, and Validate says readably what is not right yet."""

import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import nbformat
import pytest
from chromium import Browser, find_chromium, wait_for

ROOT = Path(__file__).resolve().parent.parent
RELEASE = ROOT / "assignments" / "a4_dpo" / "a4_dpo.ipynb"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="needs Chromium or Chrome; CHROMIUM can name the program"),
    pytest.mark.skipif(not RELEASE.exists(), reason="there is no release of a4_dpo here"),
]

WRONG = """def log_partition(ref_log_probs, rewards, beta):
    return torch.log((ref_log_probs.exp() * (rewards / beta).exp()).sum(-1))"""
PANEL = "[...window.jupyterapp.shell.widgets('main')].find(widget => widget.context)"
ERRORS = f"{PANEL}.content.model.sharedModel.toJSON().cells.flatMap(c => c.outputs || []).map(o => o.ename)"
BUTTON = "[...document.querySelectorAll('.jp-Toolbar-item')].find(e => /Validate/.test(e.textContent))"


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab on a folder with a release, without its experiments, whose first answer is wrong."""
    notebook = nbformat.read(RELEASE, as_version=4)
    names = [cell.metadata.get("nbgrader", {}).get("grade_id", "") for cell in notebook.cells]
    notebook.cells[names.index("solution-log_partition")].source = WRONG
    notebook.cells = [cell for cell, name in zip(notebook.cells, names) if not name.startswith("experiment-")]
    nbformat.write(notebook, tmp_path / "mine.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root"]
    command += ["--ServerApp.port_retries=0", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),  # not what this person's own JupyterLab remembers
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
    }
    server = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def answers():
        try:
            return direct.open(f"{address}/api/status", timeout=5).status == 200
        except OSError:
            return False

    try:
        wait_for(answers, 120)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def test_a_release_opens_and_runs_and_validate_shows_what_is_wrong(lab):
    browser = Browser(1400, 1000)
    try:
        browser.call("Emulation.setFocusEmulationEnabled", enabled=True)  # commands go to the notebook that has it
        browser.open(f"{lab}/lab/tree/mine.ipynb")
        wait_for(lambda: browser.settled(f"{PANEL}?.sessionContext?.session?.kernel?.status === 'idle'"), 120)
        browser.run(f"window.jupyterapp.shell.activateById({PANEL}.id)")
        browser.run("window.jupyterapp.commands.execute('runmenu:run-all').then(() => 0, () => 0)")
        wait_for(lambda: "CheckFailed" in browser.run(ERRORS), 120)
        wait_for(lambda: browser.run(f"!!{BUTTON}"), 30)
        browser.run(f"{BUTTON}.querySelector('button, jp-button').click()")
        wait_for(lambda: "Results" in (browser.run("document.querySelector('.jp-Dialog')?.innerText") or ""), 240)
        report = browser.run("document.querySelector('.jp-Dialog').innerText")
    finally:
        browser.close()
    assert "Looks like a known mistake: exp overflows" in report and "2 of 3 visible checks pass" in report
    assert "optimal_policy is not written yet" in report and "Traceback" not in report
