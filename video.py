"""Videos in files that play, and several of them in one picture.

A video is an iterable of frames, (H, W, 3) uint8, RGB, all of one size. Each file is written frame
by frame, so that a video of any length needs the memory of a few; each appears whole or not at all.
"""

import contextlib
import errno
import io
import itertools
import os
import subprocess
import tempfile
from fractions import Fraction
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import torch
from PIL import GifImagePlugin, Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

from utils import UserError, to_uint8, whole_file

FORMATS = "gif", "mp4", "png", "npy"
GIF_FPS = 50  # browsers slow down what is faster
PALETTE_BYTES = 2**23  # of the first frames, from which a GIF's colours are chosen
UNCHANGED = 255  # the entry of a GIF's palette for a pixel that stays
RESAMPLE = {"nearest": cv2.INTER_NEAREST, "lanczos": cv2.INTER_LANCZOS4}
WIDEST = 16384  # pixels; H.264 goes no further
INK, LINE, PAPER = (40, 40, 40), (150, 150, 150), (255, 255, 255)


def save_video(path, frames, fps=25):
    """Write a video as its name says: .gif, .mp4 or .npy; without an ending, a folder of PNGs.

    Raises UserError where the format cannot do it, OSError if it cannot be written.
    """
    savers = {".gif": save_gif, ".mp4": save_mp4, ".npy": save_npy, "": save_png}
    path = Path(path)
    if path.suffix not in savers:
        raise UserError(f"{path}: no such format; one of {', '.join(FORMATS)}")
    savers[path.suffix](path, frames, fps)


def save_gif(path, frames, fps=25):
    """Write a GIF that loops for ever.

    All frames share one palette, of the first 8 MB's colours (300 frames of 96×96): with one
    each, as imageio would write them, colours flicker that do not in the video. A frame lasts a
    whole number of hundredths of a second; those of 30 fps take turns, so that the video keeps
    time.
    """
    if fps > GIF_FPS:
        raise UserError(f"a GIF plays at most {GIF_FPS} frames a second: take mp4 for {fps:g}")
    frames = iter(frames)
    first = [next(frames)]
    first += itertools.islice(frames, PALETTE_BYTES // first[0].nbytes)
    every_colour = Image.fromarray(np.concatenate(first))
    palette = every_colour.quantize(UNCHANGED, method=Image.Quantize.FASTOCTREE)
    del every_colour
    colours = palette.getpalette()
    colours += [0] * (3 * 256 - len(colours))
    before = None
    with whole_file(path) as file:
        for k, frame in enumerate(itertools.chain(first, frames)):
            image = Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
            shown, options = np.asarray(image), {}
            drawn = shown
            if k:  # only what moves
                drawn = np.where(shown == before, UNCHANGED, shown).astype(np.uint8)
                options = {"transparency": UNCHANGED}
            image = Image.fromarray(drawn)
            image.putpalette(colours)
            if not k:
                for part in GifImagePlugin.getheader(image, info={"loop": 0})[0]:
                    file.write(part)
            hundredths = round(100 * (k + 1) / fps) - round(100 * k / fps)
            for part in GifImagePlugin.getdata(
                image, duration=10 * hundredths, disposal=1, **options
            ):
                file.write(part)
            before = shown
        file.write(b";")


def save_mp4(path, frames, fps=25):
    """Write an MP4 (H.264, yuv420p, BT.709) that browsers and phones play.

    H.264 in yuv420p has even sizes only: a last odd column or row is repeated.
    """
    frames = iter(frames)
    first = next(frames)
    height, width, _ = first.shape
    padding = (0, height % 2), (0, width % 2), (0, 0)
    size = f"{width + width % 2}x{height + height % 2}"
    with whole_file(path) as file, tempfile.TemporaryFile() as said:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error"]
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size]
        command += ["-r", str(Fraction(fps).limit_denominator(1001)), "-i", "-"]
        command += ["-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p"]
        colours = "scale=out_color_matrix=bt709:out_range=tv"
        colours += ",setparams=color_primaries=bt709:color_trc=bt709"
        command += ["-vf", colours, "-colorspace", "bt709"]
        command += ["-movflags", "+faststart", "-f", "mp4", f"file:{os.path.abspath(file.name)}"]
        # By hand, since imageio's writer does not say so when ffmpeg fails: on a full disk, say.
        ffmpeg = subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=said, start_new_session=True
        )
        try:
            with contextlib.suppress(BrokenPipeError), ffmpeg.stdin as pipe:
                for frame in itertools.chain([first], frames):
                    pipe.write(np.pad(frame, padding, mode="edge"))
            status = ffmpeg.wait()
        finally:
            ffmpeg.kill()
            ffmpeg.wait()
        if status:
            said.seek(0)
            last = said.read().decode(errors="replace").strip().splitlines()[-1:]
            why = f"ffmpeg cannot write it ({' '.join(last) or f'status {status}'})"
            full = "No space left" in why
            raise OSError(errno.ENOSPC if full else errno.EIO, why, str(path))


def save_npy(path, frames, fps=25):
    """Write an array (n_frames, H, W, 3) uint8, as resize.py makes them. It keeps no fps."""

    def header(length):
        buffer = io.BytesIO()
        description = {"descr": "|u1", "fortran_order": False, "shape": (length, *shape)}
        np.lib.format.write_array_header_1_0(buffer, description)
        return buffer.getvalue()

    length = 0
    with whole_file(path) as file:
        for length, frame in enumerate(frames, start=1):
            if length == 1:
                shape = frame.shape
                file.write(header(0))
            file.write(np.ascontiguousarray(frame).data)
        file.seek(0)  # NumPy leaves room there for a first axis that grows
        file.write(header(length))


def save_png(path, frames, fps=25):
    """Write a folder with a file for each frame, frame-00000.png and so on. They keep no fps."""
    part = path.with_name(path.name + ".part")
    remove_frames(part)
    part.mkdir()
    try:
        for k, frame in enumerate(frames):
            Image.fromarray(frame).save(part / f"frame-{k:05d}.png")
        remove_frames(path)
        part.rename(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove_frames(part)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def remove_frames(folder):
    """Remove a folder that `save_png` wrote, if it is there. Raises OSError if it holds more."""
    if folder.is_symlink() or not folder.is_dir():
        return
    frames = list(folder.glob("frame-*.png"))
    if len(frames) < len(list(folder.iterdir())):
        raise OSError(errno.ENOTEMPTY, "it holds other files, too", str(folder))
    for frame in frames:
        frame.unlink()
    folder.rmdir()


# ---------------------------------------------------------------- pictures of several videos


def video_grid(videos, columns=4):
    """Videos side by side: (B, 3, K, S, S) float in [-1, 1] to (K, H, W, 3) uint8."""
    frames = to_uint8(videos).cpu().unbind(dim=2)
    grids = [make_grid(f, nrow=columns, padding=2, pad_value=255) for f in frames]
    return torch.stack(grids).permute(0, 2, 3, 1).numpy()


def enlarge(frame, scale, how="nearest"):
    """A frame, (H, W, 3) uint8, `scale` times as large (a whole number), "nearest" or "lanczos"."""
    if scale == 1:
        return frame
    size = frame.shape[1] * scale, frame.shape[0] * scale
    return cv2.resize(frame, size, interpolation=RESAMPLE[how])


class LabelledGrid:
    """A sheet with a place for each of R × C videos: thin lines around them, labels at two sides.

    rows, columns: the labels, R beside the rows and C above the columns; size: S of the videos.
    Raises UserError if the sheet would be too large.
    """

    def __init__(self, rows, columns, size):
        self.size, self.rows, self.columns = size, len(rows), len(columns)
        self.font = ImageFont.load_default(max(9, size // 8))
        self.margin = sum(self.font.getmetrics()) + 4
        height, width = (self._place(n) for n in (self.rows, self.columns))
        if max(height, width) > WIDEST:
            raise UserError(
                f"{width}×{height} pixels are too many, {WIDEST} the most: take a smaller --scale, "
                "or fewer --rows and --columns"
            )
        # Even, as MP4 wants it.
        sheet = Image.new("RGB", (width + width % 2, height + height % 2), PAPER)
        lines = ImageDraw.Draw(sheet)
        lines.rectangle((self.margin, self.margin, width - 1, height - 1), LINE)
        for c, label in enumerate(columns):
            sheet.paste(self._text(label), (self._place(c), 0))
        for r, label in enumerate(rows):
            upwards = self._text(label).transpose(Image.Transpose.ROTATE_90)
            sheet.paste(upwards, (0, self._place(r)))
        self.sheet = np.array(sheet)

    def _place(self, i):
        return self.margin + 1 + i * (self.size + 1)

    def _text(self, label):
        """A label in the middle of a box; "content 1" becomes "c1" where there is no room."""
        if self.font.getlength(label) > self.size:
            *words, last = label.split()
            label = "".join(word[0] for word in words) + last
        box = Image.new("RGB", (self.size, self.margin), PAPER)
        middle = self.size / 2, self.margin / 2
        ImageDraw.Draw(box).text(middle, label, INK, self.font, anchor="mm")
        return box

    def cell(self, r, c):
        """The place of a video on the sheet: two slices, of rows and of columns of pixels."""
        return tuple(slice(self._place(i), self._place(i) + self.size) for i in (r, c))

    def frame(self, cells):
        """The sheet with a frame in each place. cells: R * C frames, (S, S, 3) uint8, by rows."""
        sheet = self.sheet.copy()
        for i, cell in enumerate(cells):
            sheet[self.cell(*divmod(i, self.columns))] = cell
        return sheet
