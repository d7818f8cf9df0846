"""Generate videos with a trained model.

python generate.py --num 16                  # 16 GIFs, in generated_videos/samples
python generate.py --num 1 --frames 250 --format mp4 --scale 4   # a video of ten seconds
python generate.py --grid content-motion     # one content per row, one motion per column
python generate.py --interpolate content     # from one content to another
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":  # a notebook may hold other modules of these names, or older ones
    for path in Path(__file__).parent.glob("*.py"):
        sys.modules.pop(path.stem, None)

import checkpoint
import utils
from data import to_uint8
from models import DIM_CONTENT, DIM_MOTION, DIM_NOISE, VideoGenerator
from utils import Parser, UserError, number
from video import FORMATS, LabelledGrid, save_video

BATCH = 64  # frames rendered at once: more need more memory and are no faster


def load_generator(path, device="cpu", raw=False):
    """The trained R_M and G_I: a VideoGenerator in evaluation mode.

    path: generator.pt or a checkpoint of main.py; raw: take the weights as trained, not their
    average. Raises UserError if it is missing, damaged or something else, OSError if it cannot be
    read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; train with main.py, or name one with --checkpoint")
    try:
        content = checkpoint.load(path)
        networks = (not raw and content.get("average")) or content["networks"]
        size = 16 * networks["G_I"]["main.0.weight"].shape[-1]  # G_I starts with S/16 × S/16 pixels
        generator = VideoGenerator(size)
        generator.motion_rnn.load_state_dict(networks["R_M"])
        generator.image_generator.load_state_dict(networks["G_I"])
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path}: it does not hold R_M and G_I of this program") from error
    if not all(weight.isfinite().all() for weight in generator.state_dict().values()):
        raise UserError(f"{path}: its weights are not finite; use an earlier checkpoint")
    if torch.device(device).type != "mps":  # four times as fast on a CPU
        generator.to(memory_format=torch.channels_last)
    return generator.to(device).eval()


def find_checkpoint(path):
    """`path`; of a folder, best.pt if it is there, else generator.pt."""
    best = path / "best.pt"
    return best if best.is_file() else path / "generator.pt" if path.is_dir() else path


def sample_contents(seed, indices):
    """The contents z_C of these indices: (n, 50), N(0, I)."""
    rngs = [np.random.default_rng((seed, 0, i)) for i in indices]
    return torch.tensor(np.stack([rng.standard_normal(DIM_CONTENT, "f4") for rng in rngs]))


def sample_motion_noise(seed, indices, frames):
    """The noise of the motions of these indices, N(0, I): e (n, K, 10) and h0 (n, 10).

    Longer noise begins as shorter noise does.
    """
    rngs = [np.random.default_rng((seed, 1, i)) for i in indices]
    h0 = np.stack([rng.standard_normal(DIM_MOTION, "f4") for rng in rngs])
    e = np.stack([rng.standard_normal((frames, DIM_NOISE), "f4") for rng in rngs])
    return torch.from_numpy(e), torch.from_numpy(h0)


def interpolate(a, b, steps):
    """`steps` samples from `a` to `b`, tensors (n, ...), in equal angles: (n, steps, ...).

    cos(t) a + sin(t) b is N(0, I) for t from 0 to π/2, as a and b are; a straight line would pass
    too close to 0.
    """
    angles = np.linspace(0, math.pi / 2, steps).tolist()
    return torch.stack([math.cos(t) * a + math.sin(t) * b for t in angles], dim=1)


@torch.no_grad()
def motion_codes(generator, e, h0):
    """Run R_M: e (n, K, 10) and h0 (n, 10) to z_M (n, K, 10), on the device of the networks."""
    device = next(generator.parameters()).device
    return generator.motion_rnn(e.to(device), h0.to(device))


@torch.no_grad()
def render_frames(generator, z_content, z_motion):
    """Render R × C videos of K frames: yields their k-th frames, (R * C, S, S, 3) uint8, by rows.

    z_content: (R, C, 50); z_motion: (R, C, K, 10); either may be an expanded view.
    """
    rows, columns, frames, _ = z_motion.shape
    videos = rows * columns
    chunk = max(1, BATCH // videos)
    z_content = z_content.to(z_motion.device)[:, :, None]
    for first in range(0, frames, chunk):
        motion = z_motion[:, :, first : first + chunk]
        content = z_content.expand(-1, -1, motion.shape[2], -1)
        z = torch.cat([content, motion], dim=3).movedim(2, 0).flatten(0, 2)  # (chunk * R * C, 60)
        pixels = torch.cat([to_uint8(generator.render(part)).cpu() for part in z.split(BATCH)])
        yield from pixels.permute(0, 2, 3, 1).unflatten(0, (-1, videos)).numpy()


def video(generator, frames=16, seed=0, index=0):
    """Video number `index` of a seed, with content `index` and motion `index`.

    Yields K = `frames` frames, (S, S, 3) uint8, RGB. A longer one begins as a shorter one does.
    """
    z_content = sample_contents(seed, [index])
    z_motion = motion_codes(generator, *sample_motion_noise(seed, [index], frames))
    return (frame for (frame,) in render_frames(generator, z_content[None], z_motion[None]))


def sample_videos(generator, num, frames=16, seed=0):
    """Videos 0 ... num - 1 of a seed, eight at a time: yields (B, K, S, S, 3) uint8 tensors."""
    for first in range(0, num, 8):
        indices = range(first, min(num, first + 8))
        z_content = sample_contents(seed, indices)
        z_motion = motion_codes(generator, *sample_motion_noise(seed, indices, frames))
        rendered = render_frames(generator, z_content[None], z_motion[None])
        yield torch.from_numpy(np.stack(list(rendered), axis=1))


def content_motion_grid(generator, rows=4, columns=6, frames=16, seed=0, scale=1):
    """A grid of videos with one content z_C per row and one motion per column (paper, figure 1).

    The contents and motions are the first of the seed, so row 1, column 1 is `video` 0. Yields
    K = `frames` frames of the labelled grid, (H, W, 3) uint8, RGB, each video `scale` times as
    large. Raises UserError if the grid is more than 16,384 pixels wide or high.
    """
    labels = [f"content {r + 1}" for r in range(rows)], [f"motion {c + 1}" for c in range(columns)]
    z_content = sample_contents(seed, range(rows))[:, None].expand(-1, columns, -1)
    z_motion = motion_codes(generator, *sample_motion_noise(seed, range(columns), frames))
    z_motion = z_motion.expand(rows, -1, -1, -1)
    return render_grid(generator, z_content, z_motion, labels, scale)


def interpolation(generator, what, rows=4, columns=6, frames=16, seed=0, scale=1):
    """Rows of videos that lead from one sample to another, with all else the same in all of them.

    what: "content" interpolates z_C, "motion" the noise of R_M (e and h0). Row r goes from sample
    2r - 1 to sample 2r of the seed, in equal angles. Yields and raises as `content_motion_grid`.
    """
    starts, ends = range(0, 2 * rows, 2), range(1, 2 * rows, 2)
    labels = (
        [f"{what} {a + 1}-{b + 1}" for a, b in zip(starts, ends)],
        [f"{round(100 * c / max(1, columns - 1))}%" for c in range(columns)],
    )
    if what == "content":
        a, b = sample_contents(seed, starts), sample_contents(seed, ends)
        z_content = interpolate(a, b, columns)
        z_motion = motion_codes(generator, *sample_motion_noise(seed, [0], frames))
        z_motion = z_motion.expand(rows, columns, -1, -1)
    else:
        z_content = sample_contents(seed, [0]).expand(rows, columns, -1)
        pairs = zip(*(sample_motion_noise(seed, indices, frames) for indices in (starts, ends)))
        noise = (interpolate(a, b, columns).flatten(0, 1) for a, b in pairs)
        z_motion = motion_codes(generator, *noise).unflatten(0, (rows, columns))
    return render_grid(generator, z_content, z_motion, labels, scale)


def render_grid(generator, z_content, z_motion, labels, scale):
    """Render R × C videos into a LabelledGrid; see `render_frames`. Yields its frames."""
    grid = LabelledGrid(*labels, generator.size * scale)
    for cells in render_frames(generator, z_content, z_motion):
        yield grid.frame(cells.repeat(scale, axis=1).repeat(scale, axis=2))


def parse_args(argv=None):
    parser = Parser(prog="generate.py", description="Generate videos with a trained model.")
    add, where = parser.add_argument, "a file of main.py, or a folder with best.pt or generator.pt"
    add("--checkpoint", type=Path, default="trained_models", help=where)
    add("--raw", action="store_true", help="the weights as trained, not their average")
    add("--num", type=number(int, 1, 10**9), default=16, help="how many videos")
    add("--frames", type=number(int, 1, 10**9), default=16, help="length of each, in frames")
    add("--fps", type=number(float, 0.1, 240), default=25, help="frames per second")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="other videos for another seed")
    add("--format", choices=FORMATS, default="gif", help="png: folders; npy: (n_frames, H, W, 3)")
    add("--out", type=Path, default="generated_videos/samples", help="folder for the videos")
    add("--scale", type=number(int, 1, 32), default=1, help="how many times as large")
    add("--grid", choices=["content-motion"], help="one video: contents by row, motions by column")
    add("--interpolate", choices=["content", "motion"], help="one video: rows from A to B")
    add("--rows", type=number(int, 1, 100), default=4, help="rows of the grid")
    add("--columns", type=number(int, 1, 100), default=6, help="columns of the grid")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return parser.parse_args(argv)


def requested_videos(args, generator):
    """Yield the name and the frames of each video that `args` ask for."""
    options = args.rows, args.columns, args.frames, args.seed, args.scale
    if args.grid:
        yield args.grid, content_motion_grid(generator, *options)
    if args.interpolate:
        name = f"interpolate-{args.interpolate}"
        yield name, interpolation(generator, args.interpolate, *options)
    for i in range(0 if args.grid or args.interpolate else args.num):
        frames = video(generator, args.frames, args.seed, i)
        yield f"video-{i:04}", (f.repeat(args.scale, 0).repeat(args.scale, 1) for f in frames)


def run(args):
    """Generate the videos that `args` ask for and write them to --out."""
    device = utils.pick_device(args.device)
    utils.set_up_device(device, deterministic=device.type == "cuda")  # same seed, same bytes
    path = find_checkpoint(args.checkpoint)
    generator = load_generator(path, device, args.raw)
    grids = bool(args.grid) + bool(args.interpolate)
    total = (grids or args.num) * args.frames
    paths = []
    with utils.lock_folders(args.out), utils.progress_bar(total=total, unit="frame") as bar:

        def count(frames):
            for frame in frames:
                yield frame
                bar.update()

        for name, frames in requested_videos(args, generator):
            paths.append(args.out / (name if args.format == "png" else f"{name}.{args.format}"))
            save_video(paths[-1], count(frames), args.fps)
        seconds = bar.format_dict["elapsed"]
    names = f"{paths[0]} … {paths[-1]}" if len(paths) > 1 else paths[0]
    source = f"of {path}, epoch {checkpoint.peek_epoch(path):,}"
    print(f"{names}: {total} frames, {total / seconds:.0f} per second, {source}")


def main(argv=None):
    args = parse_args(argv)
    with utils.one_line_errors("generate.py", "choose fewer --frames or --rows"):
        run(args)


if __name__ == "__main__":
    main()
