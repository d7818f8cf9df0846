"""Generate videos with a trained model.

python generate.py --num 16                      # 16 GIFs, in generated_videos/samples
python generate.py --num 1 --frames 250 --format mp4 --scale 4       # a video of ten seconds
python generate.py --grid content-motion         # a content a row, a motion a column
python generate.py --interpolate content         # from one content to another
"""

import contextlib
import math
from pathlib import Path

import numpy as np
import torch

import checkpoint
from models import DIM_CONTENT, DIM_MOTION, DIM_NOISE, VideoGenerator
from utils import (
    Parser,
    UserError,
    alone_in,
    folder,
    is_out_of_memory,
    number,
    one_line_errors,
    pick_device,
    progress_bar,
    set_up_machine,
    to_uint8,
)
from video import FORMATS, GIF_FPS, RESAMPLE, LabelledGrid, enlarge, remove_frames, save_video

BLOCK = 64  # frames whose noise is drawn at once: the same for every length
BATCH = 64  # points of the latent space rendered at once: the memory needed


# ---------------------------------------------------------------- the model


def load_generator(path, device="cpu"):
    """The trained R_M and G_I, a VideoGenerator in evaluation mode.

    path: of generator.pt or of a whole checkpoint, from main.py. Nothing in it is ever run.
    Raises UserError if it is not there, damaged, or something else; OSError if it can't be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path} is not there: main.py writes it when it has trained for --checkpoint-minutes, "
            "or name another with --checkpoint"
        )
    try:
        content = checkpoint.read(path)
    except checkpoint.Damaged as reason:
        raise UserError(f"{path}: {reason}") from None
    try:
        R_M, G_I = (content["networks"][name] for name in ("R_M", "G_I"))
        size = 16 * next(iter(G_I.values())).shape[-1]  # G_I begins with S / 16 × S / 16 pixels
        generator = VideoGenerator(size)
        generator.motion_rnn.load_state_dict(R_M)
        generator.image_generator.load_state_dict(G_I)
    except (AttributeError, LookupError, RuntimeError, StopIteration, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: no R_M and G_I of this program in it") from error
    if not all(weight.isfinite().all() for weight in generator.state_dict().values()):
        raise UserError(f"{path}: its weights are not finite")
    if torch.device(device).type != "mps":  # four times as fast on a CPU
        generator.to(memory_format=torch.channels_last)
    return generator.to(device).eval()


# ---------------------------------------------------------------- what is drawn


def stream(*numbers):
    """A random generator for these numbers alone."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


def contents(seed, which):
    """The contents z_C number `which` (n indices) of a seed: (n, 50), N(0, I)."""
    return torch.stack([torch.randn(DIM_CONTENT, generator=stream(seed, 0, i)) for i in which])


def motion_noise(seed, which):
    """The noise of the motions number `which` (n indices) of a seed, N(0, I).

    Yields R_M's first states h0, (n, 10), then without end the noise e of 64 frames, (n, 64, 10).
    """
    rngs = [stream(seed, 1, i) for i in which]
    yield torch.stack([torch.randn(DIM_MOTION, generator=rng) for rng in rngs])
    while True:
        yield torch.stack([torch.randn(BLOCK, DIM_NOISE, generator=rng) for rng in rngs])


def between(a, b, s):
    """From draw `a` (at s = 0) to draw `b` (s = 1), tensors of one shape.

    cos(πs/2) a + sin(πs/2) b, since that is N(0, I) for every s, as a and b are; a straight line
    would pass too close to 0.
    """
    if s in (0, 1):
        return b if s else a
    angle = s * math.pi / 2
    return math.cos(angle) * a + math.sin(angle) * b


# ---------------------------------------------------------------- videos


@torch.no_grad()
def motion_codes(generator, noise, frames):
    """Run R_M over paths of any length: yields z_M, (n, k, 10), for a block of k frames at a time.

    noise: as from `motion_noise`; frames: K, of all blocks together. R_M goes on from one block to
    the next with the state it had, which is its last code.
    """
    device = next(generator.parameters()).device
    h = next(noise).to(device)
    for first in range(0, frames, BLOCK):
        z_motion = generator.motion_rnn(next(noise)[:, : frames - first].to(device), h)
        h = z_motion[:, -1]
        yield z_motion


@torch.no_grad()
def play(generator, z_content, z_motion):
    """Render n videos frame by frame: yields their frames at one time, (n, S, S, 3) uint8.

    z_content: (n, 50); z_motion: as from `motion_codes`, (n, k, 10) at a time.
    """
    n = len(z_content)
    for block in z_motion:
        z_block = z_content.to(block.device)[:, None].expand(-1, block.shape[1], -1)
        points = torch.cat([z_block, block], dim=2).transpose(0, 1)
        for some in points.split(max(1, BATCH // n)):
            rendered = [to_uint8(generator.render(z)) for z in some.flatten(0, 1).split(BATCH)]
            pixels = torch.cat(rendered).permute(0, 2, 3, 1).cpu().numpy()
            yield from pixels.reshape(-1, n, *pixels.shape[1:])


def video(generator, frames=16, seed=0, index=0):
    """A video, number `index` of a seed: content `index` with motion `index`.

    Yields K = `frames` frames, (S, S, 3) uint8, RGB. A longer one begins as a shorter one does.
    """
    z_motion = motion_codes(generator, motion_noise(seed, [index]), frames)
    return (frame[0] for frame in play(generator, contents(seed, [index]), z_motion))


def content_motion_grid(
    generator, rows=4, columns=6, frames=16, seed=0, scale=1, resample="nearest"
):
    """A grid of videos with one content z_C a row and one motion a column (paper, figure 1).

    The contents and motions are the first of the seed, so row 1, column 1 is `video` 0. Yields
    K = `frames` frames of the labelled grid, (H, W, 3) uint8, RGB, each video `scale` times as
    large.
    """
    z_content = contents(seed, range(rows)).repeat_interleave(columns, dim=0)
    z_motion = motion_codes(generator, motion_noise(seed, range(columns)), frames)
    z_motion = (torch.cat([block] * rows) for block in z_motion)
    labels = (
        [f"content {r + 1}" for r in range(rows)],
        [f"motion {c + 1}" for c in range(columns)],
    )
    return _on_a_sheet(generator, play(generator, z_content, z_motion), labels, scale, resample)


def interpolation(
    generator, what, rows=4, columns=6, frames=16, seed=0, scale=1, resample="nearest"
):
    """Rows of videos that lead from one draw to another, all else the same in all of them.

    what: "content" goes from one z_C to another; "motion" goes from one path of noise (and R_M's
    first state) to another. Row r goes from draw 2r - 1 to draw 2r of the seed, in equal angles.
    Yields frames as `content_motion_grid` does.

    Both raise UserError if the grid is more than 16,384 pixels wide or high.
    """
    ways = [s / max(1, columns - 1) for s in range(columns)]
    starts, ends = range(0, 2 * rows, 2), range(1, 2 * rows, 2)

    def lead(a, b):  # (rows, ...) each, to (rows * columns, ...)
        return torch.stack([between(a, b, s) for s in ways], dim=1).flatten(0, 1)

    if what == "content":
        z_content = lead(contents(seed, starts), contents(seed, ends))
        z_motion = motion_codes(generator, motion_noise(seed, [0]), frames)
        z_motion = (block.expand(rows * columns, -1, -1) for block in z_motion)
    else:
        z_content = contents(seed, [0]).expand(rows * columns, -1)
        both = zip(motion_noise(seed, starts), motion_noise(seed, ends))
        z_motion = motion_codes(generator, (lead(a, b) for a, b in both), frames)
    labels = (
        [f"{what} {a + 1}-{b + 1}" for a, b in zip(starts, ends)],
        [f"{round(100 * s)}%" for s in ways],
    )
    return _on_a_sheet(generator, play(generator, z_content, z_motion), labels, scale, resample)


def _on_a_sheet(generator, played, labels, scale, resample):
    size = 16 * generator.image_generator.main[0].kernel_size[0]
    sheet = LabelledGrid(*labels, size * scale)
    for cells in played:
        yield sheet.frame(enlarge(cell, scale, resample) for cell in cells)


# ---------------------------------------------------------------- the command line


def parse(argv=None):
    parser = Parser(prog="generate.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        default=Path("trained_models/checkpoint.pt"),
        help="checkpoint.pt or generator.pt, from main.py",
    )
    add("--num", type=number(int, 1, 10**9), default=16, help="how many videos")
    add("--frames", type=number(int, 1, 10**9), default=16, help="the length of each, in frames")
    add("--fps", type=number(float, 0.1, 240), default=25, help="frames a second")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="other videos for another seed")
    add(
        "--format",
        choices=FORMATS,
        default="gif",
        help="png: a folder of frames; npy: arrays (n_frames, H, W, 3)",
    )
    add("--out", type=folder, default="generated_videos/samples", help="folder for the videos")
    add("--scale", type=number(int, 1, 32), default=1, help="how many times as large")
    add("--resample", choices=RESAMPLE, default="nearest", help="how to enlarge")
    add(
        "--grid",
        choices=["content-motion"],
        help="one video instead: a content a row, a motion a column",
    )
    add(
        "--interpolate",
        choices=["content", "motion"],
        help="one video instead: in each row from one draw of it to another",
    )
    add("--rows", type=number(int, 1, 100), default=4, help="of --grid and --interpolate")
    add("--columns", type=number(int, 1, 100), default=6, help="of --grid and --interpolate")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return parser, parser.parse_args(argv)


def pictures(args, generator):
    """Yield the name and the frames of each video asked for."""
    of_sheets = args.rows, args.columns, args.frames, args.seed, args.scale, args.resample
    if args.grid:
        yield args.grid, content_motion_grid(generator, *of_sheets)
    if args.interpolate:
        name = f"interpolate-{args.interpolate}"
        yield name, interpolation(generator, args.interpolate, *of_sheets)
    if args.grid or args.interpolate:
        return
    digits = max(4, len(str(args.num - 1)))
    for i in range(args.num):
        frames = video(generator, args.frames, args.seed, i)
        yield f"video-{i:0{digits}}", (enlarge(f, args.scale, args.resample) for f in frames)


def run(args):
    """Generate what `args` ask for."""
    if args.format == "gif" and args.fps > GIF_FPS:
        raise UserError(f"--fps {args.fps:g}: a GIF plays at most {GIF_FPS}; take --format mp4")
    device = pick_device(args.device)
    generator = load_generator(args.checkpoint, device)
    set_up_machine(device, deterministic=device.type == "cuda")  # the same seed, the same bytes
    with alone_in(args.out):
        try:
            write(args, generator)
        finally:  # nothing but videos stays there
            with contextlib.suppress(OSError):
                (args.out / ".lock").unlink()


def write(args, generator):
    """Generate what `args` ask for, into the folder that they name."""
    for name in ("video-*", "content-motion*", "interpolate-*"):
        for part in args.out.glob(f"{name}.part"):  # of a call that was killed
            remove_frames(part) if part.is_dir() else part.unlink()
    sheets = bool(args.grid) + bool(args.interpolate)
    total = args.frames * (sheets or args.num)
    suffix = "" if args.format == "png" else f".{args.format}"
    there = set(args.out.iterdir())
    first, replaced = None, 0
    with progress_bar(total=total, unit="frame", unit_scale=total > 99999) as bar:

        def counted(frames):
            for frame in frames:
                yield frame
                bar.update()

        for name, frames in pictures(args, generator):
            path = args.out / f"{name}{suffix}"
            save_video(path, counted(frames), args.fps)
            first = first or path
            replaced += path in there
            there.discard(path)
        seconds = bar.format_dict["elapsed"]
    names = str(path) if path == first else f"{first} … {path}"
    print(f"{names}: {total} frames, {total / seconds:.0f} a second")
    if replaced:
        print(f"note: {replaced} of that name were there and are replaced")
    stale = [path.name for path in there if path.name.startswith("video-")]
    if stale and not sheets:
        print(f"note: {args.out} also holds {len(stale)} of an earlier call, as {min(stale)}")


def main(argv=None):
    parser, args = parse(argv)
    with one_line_errors(parser):
        try:
            run(args)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError("not enough memory: take a smaller --scale or fewer --rows") from error


if __name__ == "__main__":
    main()
