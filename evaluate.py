"""Measure generated videos against the real clips.

    python evaluate.py                                     # the newest generator of main.py
    python evaluate.py --checkpoint trained_models         # all generators there; the best is named
    python evaluate.py --fake videos                       # videos made elsewhere
    python evaluate.py --features mc3_18 i3d               # other features; i3d gives FVD

Of features: the Fréchet distance (of Gaussians with their means and covariances; it grows where
videos are few), the kernel distance (unbiased) and diversity. Of pixels: ACD, motion, and how near
the nearest real window is. The column "real" is the floor: other windows of the same clips.
"""

import contextlib
import hashlib
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

if __name__ == "__main__":  # a notebook may hold other modules of these names, or older ones
    for path in Path(__file__).parent.glob("*.py"):
        sys.modules.pop(path.stem, None)

import checkpoint
import generate
import utils
from data import ClipDataset, load_clip
from features import I3D_SHA256, NETWORKS, Features
from resize import find_sources
from utils import Parser, UserError, number
from video import LabelledGrid, Unusable

STILLS, THUMBNAIL = (4, 24)  # frames of a video, and their width, to find its nearest window
PAIRS, PAIRS_PATH = (10, Path("generated_videos/nearest.png"))


def frechet_distance(x, y):
    """The Fréchet distance of Gaussians with the means and covariances of (n, d), (m, d) features.

    |μ_x - μ_y|² + Tr(Σ_x + Σ_y - 2 (Σ_x Σ_y)^½). With X, centred x over √(n - 1), Σ_x is XᵀX, and
    the last trace is the sum of the singular values of X Yᵀ: no covariance matrix is needed.
    """
    x, y = x.double(), y.double()
    X, Y = ((a - a.mean(0)) / (len(a) - 1) ** 0.5 for a in (x, y))
    root = torch.linalg.svdvals(torch.linalg.qr(X, "r").R @ torch.linalg.qr(Y, "r").R.T).sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + (X**2).sum() + (Y**2).sum() - 2 * root).item()


def kernel_distance(x, y):
    """Unbiased MMD² of (n, d) and (m, d) features, with KID's kernel, (a·b / d + 1)³."""

    def mean_kernel(a, b):
        k = (a.double() @ b.double().T / a.shape[1] + 1) ** 3
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1)) if a is b else k.mean()

    return (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)).item()


def still_indices(frames):
    return torch.linspace(0, frames - 1, STILLS).round().long()


def thumbnails(images):
    """(n, S, S, 3) uint8 to (n, 3 * 24 * 24) float32, around 0."""
    parts = images.movedim(-1, 1).split(64)
    return torch.cat([F.adaptive_avg_pool2d(x - 127.5, THUMBNAIL) for x in parts]).flatten(1)


def find_nearest(images, clips, own=None):
    """Find the real window that is nearest to each video, by thumbnails of four frames.

    images: these frames, (n, 4, S, S, 3) uint8; own: (n,), the clip of each, which is left out.
    Returns RMS differences in 8-bit levels, and indices of clips and of first frames: (n,) each.
    """
    x = thumbnails(images.flatten(0, 1)).reshape(len(images), -1)
    nearest = torch.full((3, len(x)), float("inf"))
    for c in range(len(clips)):
        clip = thumbnails(torch.from_numpy(np.array(clips.clip(c))))
        start = torch.arange(len(clip) - clips.frames + 1)[:, None]
        windows = clip[start + still_indices(clips.frames)].flatten(1)
        distance, start = (torch.cdist(x, windows) / x.shape[1] ** 0.5).min(1)
        found = torch.stack([distance, torch.full_like(distance, c), start])
        if own is not None:
            distance[own == c] = float("inf")
        nearest = torch.where(distance < nearest[0], found, nearest)
    distance, clip, start = nearest
    return distance, clip.long(), start.long()


class Evaluator:
    """Measures videos against real clips.

    clips: a ClipDataset; networks: Features; num: videos on either side; seed: of the real windows,
    which are sampled as in training. What is computed of them is kept in the folder of the clips.
    `real_metrics`: those of other real windows. Raises UserError if videos or clips are too few.
    """

    def __init__(self, clips, networks, num, seed=0, device="cpu"):
        self.clips, self.networks, self.num, self.device = clips, networks, num, device
        if len(clips) < 2:
            raise UserError(f"{clips.folder}: one clip alone cannot be measured against")
        for network in networks:
            if 5 * num < network.dim:
                needed = f"it has {network.dim:,} features; take {-(-network.dim // 5)} or more"
                raise UserError(f"{num} videos are too few for {network.name}: {needed}")
        key = [clips.fingerprint(), clips.frames, num, seed, str(device)]
        key += [network.sha256 for network in networks]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        path = clips.folder / ".evaluation" / f"{name}.pt"
        try:
            content = checkpoint.load(path)["content"]
        except Exception:  # not there, or damaged
            rng = torch.Generator().manual_seed(seed)
            real, _ = self._describe_real(rng, "real clips")
            other, clip = self._describe_real(rng, "other windows of them")
            distances, _, _ = find_nearest(other.pop("images"), clips, own=clip)
            del real["images"]
            content = real, other, distances
            with contextlib.suppress(OSError):  # a folder that cannot be written to, a full disk
                path.parent.mkdir(exist_ok=True)
                checkpoint.save(path, {"epoch": 0, "content": content})
        self.real, other, distances = content
        self.memorised_threshold = distances.quantile(0.01)
        self.real_metrics = self._metrics(other, distances)
        self.criterion = next(iter(self.real_metrics))  # by which the best generator is chosen

    def _describe_real(self, rng, name):
        """Sample and describe real windows. Returns what `_describe` does, and their clips."""
        clip, start, _ = self.clips.sample_indices(self.num, rng)
        batches = (self.clips.windows(c, s) for c, s in zip(clip.split(8), start.split(8)))
        return self._describe(batches, name), clip

    @torch.no_grad()
    def _describe(self, batches, name):
        """All that is compared of videos: a dict of tensors with a row for each, on the CPU."""
        rows, first = defaultdict(list), 0
        with utils.progress_bar(total=self.num, desc=name, unit="video", disable=not name) as bar:
            for windows in batches:
                rows["images"].append(windows[:, still_indices(windows.shape[1])])
                windows = windows.to(self.device)
                for network in self.networks:
                    for kind, features in network(windows, first).items():
                        rows[f"{network.name}_{kind}"].append(features.float())
                pixels = windows.float()
                colours = pixels.mean((2, 3)).cpu()
                rows["acd"].append(torch.stack([F.pdist(colour).mean() for colour in colours]))
                rows["motion"].append(pixels.diff(dim=1).abs().mean((1, 2, 3, 4)))
                first += len(windows)
                bar.update(len(windows))
        return {name: torch.cat(parts).cpu() for name, parts in rows.items()}

    def _metrics(self, videos, distances):
        real, metrics = self.real, {}
        for name in (name for name in videos if name.endswith(("_clips", "_frames"))):
            is_fvd = name == "i3d_clips" and I3D_SHA256 in [n.sha256 for n in self.networks]
            frechet = "i3d_fvd" if is_fvd else f"{name}_frechet"
            metrics[frechet] = frechet_distance(real[name], videos[name])
            metrics[f"{name}_kernel"] = kernel_distance(real[name], videos[name])
            spread, spread_real = (F.pdist(x[name]).mean().item() for x in (videos, real))
            metrics[f"{name}_diversity"] = spread / spread_real
        metrics["acd"] = videos["acd"].mean().item()
        metrics["motion"] = (videos["motion"].mean() / real["motion"].mean()).item()
        metrics["nearest"] = distances.median().item()
        metrics["memorised"] = (distances < self.memorised_threshold).float().mean().item()
        return metrics

    def measure(self, batches, name=""):
        """The metrics of videos, iterable of (B, T, S, S, 3) uint8: floats by name.

        name: for a progress bar. Also returns, of the ten videos nearest to a real window, four
        frames, (10, 4, S, S, 3), and what `find_nearest` returns.
        """
        videos = self._describe(batches, name)
        found = find_nearest(videos["images"], self.clips)
        nearest = found[0].argsort()[:PAIRS]
        return self._metrics(videos, found[0]), [x[nearest] for x in (videos["images"], *found)]


def read_videos(folder, num, frames, size):
    """The first `num` windows of the videos, arrays and folders of frames in `folder`.

    Returns a list of (1, T, S, S, 3) uint8 tensors. Raises UserError if there is none, or if frames
    are not S × S.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of videos")
    sources, skipped = find_sources(folder, folder)
    readers, windows = {reader.path: reader for reader in sources.values()}, []
    arrays = [path for path in utils.files_below(folder) if path.suffix == ".npy"]
    for path in sorted([*readers, *arrays]):
        video = []
        try:
            for frame in readers.get(path) or load_clip(path, frames):
                if frame.shape != (size, size, 3):
                    raise UserError(f"{path}: frames are {frame.shape}, not ({size}, {size}, 3)")
                video.append(frame)
        except (ValueError, Unusable) as reason:
            skipped.append((path, reason))
            continue
        if len(video) < frames:
            skipped.append((path, f"fewer than {frames} frames"))
        starts = range(0, len(video) - frames + 1, frames)
        windows += [torch.from_numpy(np.stack(video[s : s + frames]))[None] for s in starts]
        if len(windows) >= num:
            break
    for path, reason in skipped:
        print(f"skipped {path}: {reason}")
    if not windows:
        raise UserError(f"{folder}: no videos of at least {frames} frames")
    return windows[:num]


def find_generators(paths):
    """The files that `paths` name: of a folder, one for each epoch."""
    files = []
    for path in paths:
        inside = {checkpoint.peek_epoch(file): file for file in sorted(path.glob("*.pt"))}
        if damaged := inside.pop(float("inf"), None):
            print(f"skipped {damaged}: damaged, or not a checkpoint of this program")
        files += [inside[epoch] for epoch in sorted(inside)] or [path]
    return files


def save_pairs(path, clips, images, distance, clip, start):
    """Write a picture of videos and of the real windows nearest to them, from `measure`."""
    cells = []
    for video, c, s in zip(images.numpy(), clip, start):
        cells += [*video, *clips.clip(c)[s + still_indices(clips.frames)]]
    labels = [f"{d:.1f}" for d in distance], STILLS * ["generated"] + STILLS * ["real"]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(LabelledGrid(*labels, clips.size).frame(cells)).save(path)


def print_metrics(title, repeats, real):
    """Print mean ± deviation of `repeats`, a list of metrics, beside the `real` ones."""
    print(f"\n{title}\n{'':40}{'generated':>20}{'real':>15}")
    for name in real:
        values = [metrics[name] for metrics in repeats]
        deviation = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
        print(f"{name:40}{f'{np.mean(values):.4g}{deviation}':>20}{real[name]:15.4g}")


def parse_args(argv=None):
    parser = Parser(prog="evaluate.py", description="Measure videos against the real clips.")
    add = parser.add_argument
    add("--raw", action="store_true", help="the weights as trained, not their average")
    add("--data", type=Path, default="resized_data", help="folder of real clips, from resize.py")
    add("--num", type=number(int, 2, 20_000), default=2048, help="videos on either side")
    add("--frames", type=number(int, 16), default=16, help="of each video")
    add("--repeats", type=number(int, 1), default=3, help="with other generated videos")
    add("--seed", type=number(int, 0, 2**62), default=0, help="of the first repeat")
    add("--features", choices=NETWORKS, nargs="+", default=NETWORKS[:1], help="of which networks")
    add("--weights", type=Path, help="a TorchScript file of i3d, instead of the download")
    add("--json", type=Path, help="append a line for each generator to this file")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--checkpoint", type=Path, nargs="+", help="files or folders; default: the newest")
    add("--fake", type=Path, help="a folder of videos made elsewhere")
    return parser.parse_args(argv)


def run(args):
    """Measure what `args` ask for; print the metrics, append to --json, and write the pairs."""
    device = utils.pick_device(args.device)
    utils.set_up_device(device, deterministic=device.type == "cuda")
    clips = ClipDataset(args.data, args.frames)
    for line in clips.skipped:
        print(f"skipped {line}")
    if args.json:
        args.json.touch()  # an error comes before the work
    num, candidates = args.num, []  # path, epoch, and the videos of each repeat
    if args.fake:
        windows = read_videos(args.fake, num, args.frames, clips.size)
        num = len(windows)
        candidates.append((args.fake, None, [windows]))
    else:
        for path in find_generators(args.checkpoint or [Path("trained_models/generator.pt")]):
            generator = generate.load_generator(path, device, args.raw)
            if generator.size != clips.size:
                raise UserError(f"{path}: {generator.size} pixels, the clips have {clips.size}")
            seeds = range(args.seed, args.seed + args.repeats)
            repeats = [generate.sample_videos(generator, num, args.frames, s) for s in seeds]
            candidates.append((path, checkpoint.peek_epoch(path), repeats))
    networks = [Features(name, device, args.weights) for name in dict.fromkeys(args.features)]
    evaluator = Evaluator(clips, networks, num, args.seed, device)
    record = {"date": time.strftime("%Y-%m-%d"), "n": num, "frames": args.frames}
    record |= {"size": clips.size, "seed": args.seed, "raw": args.raw, "data": clips.fingerprint()}
    record |= {"features": {network.name: network.sha256 for network in networks}}
    record |= {"device": device.type, "torch": str(torch.__version__)}

    print(f"{num:,} videos of {args.frames} frames, {clips.size}×{clips.size}, against {args.data}")
    best = (float("inf"),)
    for path, epoch, repeats in candidates:
        title = str(path) if args.fake else f"{path}, epoch {epoch:,}"
        measured, found = zip(*(evaluator.measure(videos, title) for videos in repeats))
        print_metrics(title, measured, evaluator.real_metrics)
        record |= {"path": str(path), "epoch": epoch}
        record |= {"real": evaluator.real_metrics, "repeats": measured}
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps(record) + "\n")
        score = np.mean([metrics[evaluator.criterion] for metrics in measured])
        best = min(best, (score, title, found[-1]), key=lambda entry: entry[0])

    _, title, found = best
    if len(candidates) > 1:
        print(f"\nbest: {title}, by {evaluator.criterion}")
    save_pairs(PAIRS_PATH, clips, *found)
    print(f"\n{PAIRS_PATH} shows the {PAIRS} videos that are nearest to a real window")


def main(argv=None):
    args = parse_args(argv)
    with utils.one_line_errors("evaluate.py", "take a smaller --num"):
        run(args)


if __name__ == "__main__":
    main()
