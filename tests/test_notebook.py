"""mocogan.ipynb, run cell by cell as Jupyter and Colab do, in an empty folder."""

import base64
import io
import os
import re
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from PIL import Image, ImageSequence

NOTEBOOK = ROOT / "mocogan.ipynb"
ADDRESS = "https://github.com/OWNER/mocogan"


def published(folder):
    """A Git repository of the project as it is, with changes that are not committed."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".html", ".txt"):
            shutil.copy(path, folder)
    with open(folder / "synthetic.py", "a") as file:  # to be quick
        file.write("\nPEOPLE = PEOPLE[:1]\n")
    git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b"]
    for step in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *step], check=True)
    return folder


def fill_in(notebook, **fields):
    """Give the form fields other values, wherever they are."""
    for name, value in fields.items():
        field = re.compile(rf"^{name} = .*?(?=  # @param)", re.MULTILINE)
        assert any(field.search(cell.source) for cell in notebook.cells), name
        for cell in notebook.cells:
            cell.source = field.sub(f"{name} = {value!r}", cell.source)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after all cells ran; "offline", and with a stand-in for Colab's Drive."""
    folder = tmp_path_factory.mktemp("notebook")
    repository = published(folder / "repository")
    fake = folder / "fake" / "google" / "colab"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("")
    (fake / "drive.py").write_text(
        f"import pathlib\ndef mount(at):\n    pathlib.Path({str(folder)!r}, 'MyDrive').mkdir()\n"
    )
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    fill_in(
        notebook,
        repository=str(repository),
        use_drive=True,
        epochs=2,
        more_epochs=1,
        batch_size=2,
        sample_every=1,
    )
    for cell in notebook.cells:
        cell.source = cell.source.replace("/content/drive/MyDrive", str(folder / "MyDrive"))
        cell.source = cell.source.replace("--synthetic", "--synthetic --size 32")  # to be quick
    home = folder / "content"
    home.mkdir()
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    environment = {
        **os.environ,
        **nowhere,
        "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder / "fake"),
        "IPYTHONDIR": str(folder / "ipython"),
        "no_proxy": "",
        "JUPYTER_PLATFORM_DIRS": "1",
    }
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(home)}},
    )
    client.execute(env=environment)
    return notebook, folder


def outputs(executed, cell):
    """What the cell with that id printed, on both streams, and the data that it shows."""
    notebook, _ = executed
    (found,) = (one for one in notebook.cells if one.id == cell)
    printed = {"stdout": "", "stderr": ""}
    shown = []
    for output in found.outputs:
        if output.output_type == "stream":
            printed[output.name] += output.text
        elif output.output_type in ("display_data", "execute_result"):
            shown.append(output.data)
    return printed, shown


def images(shown, kind):
    """The images of that kind (gif, png) among what is shown: bytes."""
    for data in shown:
        for encoded in re.findall(rf"data:image/{kind};base64,([^\"]+)", data.get("text/html", "")):
            yield base64.b64decode(encoded)


def gifs(shown):
    """The frames of the GIFs among what is shown."""
    for data in images(shown, "gif"):
        gif = Image.open(io.BytesIO(data))
        yield np.stack([np.array(f.convert("RGB")) for f in ImageSequence.Iterator(gif)])


def test_notebook_runs_every_cell(executed):
    notebook, folder = executed
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) >= 9 and all(cell.execution_count for cell in cells)
    for cell in cells:
        printed, _ = outputs(executed, cell.id)
        assert "Traceback" not in printed["stdout"] + printed["stderr"]
        if cell.id != "clips":
            assert printed["stderr"] == "", cell.id  # Jupyter shows that in red
    assert (folder / "content" / "mocogan" / ".git").is_dir()  # cloned
    assert (folder / "MyDrive" / "mocogan" / "trained_models" / "checkpoint.pt").exists()


def test_notebook_uses_synthetic_clips_without_a_network(executed):
    printed, _ = outputs(executed, "clips")
    (line,) = printed["stderr"].splitlines()
    assert line.startswith("resize.py: error: cannot download ") and "bend.zip" in line
    assert "making synthetic ones instead" in printed["stdout"]
    assert "10 clips, " in printed["stdout"]


@pytest.mark.parametrize("cell, done", [("train", 2), ("resume", 3)])
def test_notebook_leaves_one_progress_bar(executed, cell, done):
    """What is left on the screen where each line begins anew after a carriage return."""
    printed, _ = outputs(executed, cell)
    lines = [line.split("\r")[-1] for line in printed["stdout"].split("\n")]
    bars = [line for line in lines if re.search(r"\d+/\d+ \|", line)]
    assert (
        len(bars) == 1
        and bars[0].startswith(f"{done}/{done} |")
        and re.search("D: image .* G: image", bars[0])
    )
    assert any(line.startswith("done: ") for line in lines)


def test_notebook_shows_gifs_inline(executed):
    for cell, epoch in (("samples", 2), ("resume", 3)):
        _, shown = outputs(executed, cell)
        samples, real = gifs(shown)
        assert samples.shape == real.shape == (16, 138, 138, 3)
        assert f"epoch-{epoch:06d}.gif" in shown[0]["text/html"] and real.std() > 20
        (losses,) = images(shown, "png")
        assert Image.open(io.BytesIO(losses)).size == (1800, 600)
    for cell, shape in (("grid", (16, 154, 222, 3)), ("interpolation", (16, 86, 222, 3))):
        (sheet,) = gifs(outputs(executed, cell)[1])
        assert sheet.shape == shape
    (pairs,) = images(outputs(executed, "evaluate")[1], "png")
    assert Image.open(io.BytesIO(pairs)).height > 10 * 32  # ten rows of pairs
    _, shown = outputs(executed, "long")
    assert any("data:video/mp4;base64," in data.get("text/html", "") for data in shown)


@pytest.mark.parametrize("script", ["main.py", "generate.py", "resize.py"])
def test_scripts_run_beside_modules_of_the_same_names(tmp_path, script):
    """In a kernel that has imported another `utils` and `models`, or ours before they changed."""
    (tmp_path / "utils.py").write_text("")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    code = published(tmp_path / "code")
    edit = f"import pathlib; pathlib.Path({str(code / 'video.py')!r}).write_text('1 / 0')"
    lines = ["import utils, models", f"%run {code / script} -h", edit, f"%run {code / script} -h"]
    environment = {**os.environ, "IPYTHONDIR": str(tmp_path / "ipython")}
    command = [sys.executable, "-m", "IPython", "--no-banner", "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.count(f"usage: {script}") == 1, done.stdout
    assert "ImportError" not in done.stdout and "ZeroDivisionError" in done.stdout + done.stderr


def test_notebook_is_committed_without_outputs():
    """It is committed without outputs, and the README's badge has the address that it clones."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        assert not cell.get("outputs") and not cell.get("execution_count")
    assert ADDRESS in NOTEBOOK.read_text(encoding="utf-8")
    path = ADDRESS.removeprefix("https://github.com/")
    badge = f"https://colab.research.google.com/github/{path}/blob/main/mocogan.ipynb"
    assert badge in (ROOT / "README.md").read_text(encoding="utf-8")
