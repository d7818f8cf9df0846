"""The networks of evaluate.py; those that would be downloaded have random weights here."""

import functools
import hashlib
import http.server
import threading
import urllib.error
from unittest import mock

import matplotlib.cbook
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import get_model, get_model_weights

import features
from features import NETWORKS, Features
from utils import UserError


def windows(n=2, size=32):
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 16, size, size, 3), dtype=torch.uint8, generator=rng)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder for downloaded weights."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_lite0_gives_features_of_frames_and_over_time():
    network = Features("efficientnet_lite0")
    x = windows(3, 64)
    found = network(x, first=15)
    assert network.dim == 1280 and network.sha256.startswith("57934424")  # as in the file's name
    assert found["clips"].shape == (3, 2560) and found["frames"].shape == (3, 1280)
    for i in range(3):
        frames = torch.cat([network(x[i : i + 1], first=k)["frames"] for k in range(16)])
        torch.testing.assert_close(found["frames"][i], frames[(15 + i) % 16], rtol=1e-3, atol=1e-4)
        expected = torch.cat([frames.mean(0), frames.std(0)])
        torch.testing.assert_close(found["clips"][i], expected, rtol=1e-3, atol=1e-4)


def test_lite0_knows_a_photo():
    """A man in a uniform: the pixels are scaled as it was trained, and the weights are there."""
    _, network, extract = features.load_lite0()
    with Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        image = np.array(image.crop((0, 0, 512, 512)).resize((224, 224)))
    pixels = torch.from_numpy(image)
    with torch.no_grad():
        logits = network.eval()._fc(extract(pixels.permute(2, 0, 1)[None]))
    assert logits.argmax() == 652  # military uniform


@pytest.mark.parametrize(
    "name, dim", [("mc3_18", 512), ("r3d_18", 512), ("s3d", 1024), ("inception_v3", 2048)]
)
def test_networks_of_torchvision(hub, name, dim):
    weights = get_model_weights(name).DEFAULT
    options = {"init_weights": False} if name == "inception_v3" else {}
    state = get_model(name, weights=None, **options).state_dict()
    path = hub / weights.url.rpartition("/")[2]
    torch.save(state, path)
    network = Features(name)
    assert network.dim == dim and network.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    x = windows(2, 48)[:, : 2 if name == "inception_v3" else 16]
    found = network(x)
    assert found["clips"].shape == (2, 2 * dim if name == "inception_v3" else dim)
    changed = x.clone()
    changed[0, :, :, 0] = 255 - changed[0, :, :, 0]  # at the margin, which is not cut off
    changed = network(changed)["clips"]
    assert not torch.equal(changed[0], found["clips"][0])
    torch.testing.assert_close(changed[1], found["clips"][1])  # in evaluation mode


class FakeI3D(torch.nn.Module):
    """Takes what the real one takes; its features are the colours' means, 400 numbers."""

    def forward(
        self, x, rescale: bool = False, resize: bool = False, return_features: bool = False
    ):
        assert x.shape[1:] == (3, 16, 32, 32) and rescale and resize and return_features
        assert x.dtype == torch.float32
        return x.mean((2, 3, 4)).repeat(1, 134)[:, :400]


@pytest.fixture(scope="module")
def i3d_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("i3d") / "i3d_torchscript.pt"
    torch.jit.script(FakeI3D()).save(path)
    return path


def test_i3d_from_a_file_and_downloaded_once(hub, i3d_file, monkeypatch):
    x = windows()
    network = Features("i3d", weights=i3d_file)
    assert network.dim == 400 and network(x)["clips"].shape == (2, 400)
    torch.testing.assert_close(network(x)["clips"][:, :3], x.float().mean((1, 2, 3)))

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=i3d_file.parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/i3d_torchscript.pt"
    monkeypatch.setattr(features, "I3D_URL", url)
    with pytest.raises(UserError, match=r"i3d: cannot load .*hash value.*--weights"):
        Features("i3d")  # another checksum
    assert not any(hub.iterdir())
    monkeypatch.setattr(features, "I3D_SHA256", network.sha256)
    assert Features("i3d").sha256 == network.sha256
    server.shutdown()
    server.server_close()
    assert Features("i3d").sha256 == network.sha256  # without the server


def test_weights_that_are_none_or_cannot_be_fetched(hub, tmp_path, monkeypatch):
    (tmp_path / "text").write_text("no weights")
    for path in (tmp_path / "text", tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=f"{path}: cannot load the weights of i3d") as error:
            Features("i3d", weights=path)
        assert "\n" not in str(error.value)
    refused = mock.Mock(side_effect=urllib.error.URLError(OSError("Connection refused")))
    monkeypatch.setattr(torch.hub, "urlopen", refused)
    for name in NETWORKS[1:]:
        with pytest.raises(UserError, match=f"{name}: cannot load .*refused.*efficientnet_lite0"):
            Features(name)
    assert not any(hub.iterdir())
