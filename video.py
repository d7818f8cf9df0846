"""Reading and writing of videos, and grids of several videos in one.

A video is an iterable of frames, (H, W, 3) uint8, RGB, all of one size. Frames are read and written
one at a time, so that a video of any length needs little memory; only a GIF is held as a whole.
"""

import contextlib
import errno
import itertools
import os
from pathlib import Path

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # a bad file gets our line, not FFmpeg's
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")

import cv2
import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

from utils import UserError, atomic_write

VIDEOS = {".avi", ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".gif", ".mpg", ".mpeg", ".wmv"}
VIDEOS |= {".3gp", ".flv", ".mts", ".m2ts", ".ts", ".ogv"}
STRIPS = {".jpg", ".jpeg", ".png"}
FORMATS = ("gif", "mp4", "png", "npy")
GIF_FPS = 50  # browsers slow down what is faster
PALETTE_BYTES = 2**23  # of the first frames, from which a GIF's colours are chosen
RESAMPLE = {"nearest": cv2.INTER_NEAREST, "lanczos": cv2.INTER_LANCZOS4}
MAX_PIXELS = 16384  # the largest width and height of H.264


class Unusable(Exception):
    """Why a file gives no clip."""


def read_frames(path):
    """Yield the frames of a video or of an image strip: (H, W, 3) uint8, RGB.

    Raises Unusable if `path` is not what its suffix says, OSError if it cannot be read.
    """
    return read_strip(path) if path.suffix.lower() in STRIPS else read_video(path)


def read_video(path):
    """Yield the frames of a video file or GIF, turned upright as its metadata says."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # OpenCV ends the process on such a name
        raise Unusable("its name is not valid UTF-8: rename it") from None
    with open(path, "rb"):  # its OSError says more than OpenCV does
        capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)
    try:
        if not capture.isOpened():
            raise Unusable("not a video that can be read")
        while True:
            ok, frame = capture.read()
            if not ok:
                break
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()


def read_strip(path):
    """Yield the square frames of an image strip, side by side or one below the other."""
    content = np.frombuffer(path.read_bytes(), np.uint8)
    image = cv2.imdecode(content, cv2.IMREAD_COLOR) if len(content) else None
    if image is None:
        raise Unusable("not an image that can be read")
    height, width = image.shape[:2]
    side = min(height, width)
    if max(height, width) % side:
        raise Unusable(f"{width}×{height} is not a strip of square frames")
    image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    yield from np.split(image, max(height, width) // side, axis=1 if width > height else 0)


def save_video(path, frames, fps=25):
    """Write a video in the format of its suffix: .gif, .mp4, .npy; none: a folder of PNGs.

    frames: iterable of (H, W, 3) uint8, RGB. Raises UserError where the format cannot do it,
    OSError if it cannot be written.
    """
    savers = {".gif": save_gif, ".mp4": save_mp4, ".npy": save_npy, "": save_png}
    path = Path(path)
    if path.suffix not in savers:
        raise UserError(f"{path}: unknown format, choose one of {', '.join(FORMATS)}")
    savers[path.suffix](path, frames, fps)


def save_gif(path, frames, fps=25):
    """Write a GIF that loops for ever. Its memory grows with the length: a byte or two a pixel.

    All frames share one palette and none is dithered, so that what stands still in the video
    stands still in the GIF. Durations are whole hundredths of a second and differ by one at most;
    their sum does not drift. Pillow merges equal frames into one that lasts as long as they do.
    Raises UserError above 50 fps.
    """
    if fps > GIF_FPS:
        raise UserError(f"a GIF plays at most {GIF_FPS} frames per second: use mp4 for {fps:g}")
    frames = iter(frames)
    first = [next(frames)]
    first += itertools.islice(frames, PALETTE_BYTES // first[0].nbytes)
    # 255 colours: Pillow needs the last entry for pixels that do not change.
    palette = Image.fromarray(np.concatenate(first)).quantize(255, Image.Quantize.FASTOCTREE)
    images = [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in itertools.chain(first, frames)
    ]
    times = [round(100 * k / fps) for k in range(len(images) + 1)]  # hundredths of a second
    durations = [10 * (end - start) for start, end in itertools.pairwise(times)]
    options = {"append_images": images[1:], "duration": durations, "loop": 0, "optimize": True}
    with atomic_write(path) as file:
        images[0].save(file, format="GIF", save_all=True, **options)


def save_mp4(path, frames, fps=25):
    """Write an MP4 (H.264, yuv420p, BT.709) that browsers and phones play.

    H.264 in yuv420p has even sizes only: the last row or column of an odd size is repeated.
    """
    try:
        imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise UserError("there is no ffmpeg here: pip install imageio-ffmpeg") from None
    bt709 = "scale=out_color_matrix=bt709:out_range=tv"
    bt709 += ",setparams=color_primaries=bt709:color_trc=bt709"
    frames = iter(frames)
    first = next(frames)
    height, width, _ = first.shape
    padding = (0, height % 2), (0, width % 2), (0, 0)
    # imageio does not report that ffmpeg failed at the end: count the frames in the file, too.
    failure = OSError(errno.EIO, "ffmpeg could not write it; is the disk full?", str(path))
    with atomic_write(path) as file:
        part = os.path.abspath(file.name)
        encoder = imageio_ffmpeg.write_frames(
            part,
            (width + width % 2, height + height % 2),
            fps=fps,
            codec="libx264",
            quality=None,  # which -crf sets
            macro_block_size=1,  # do not scale to multiples of 16
            ffmpeg_log_level="quiet",
            output_params=["-crf", "18", "-vf", bt709, "-colorspace", "bt709"]
            + ["-movflags", "+faststart", "-f", "mp4"],
        )
        written = 0
        with contextlib.closing(encoder):
            encoder.send(None)  # start ffmpeg
            for frame in itertools.chain([first], frames):
                padded = np.pad(frame, padding, mode="edge")
                try:
                    encoder.send(padded)
                except OSError as error:
                    raise failure from error
                written += 1
        try:
            readable, _ = imageio_ffmpeg.count_frames_and_secs(part)
        except RuntimeError as error:
            raise failure from error
        if readable != written:
            raise failure


def save_npy(path, frames, fps=25):
    """Write the array (n_frames, H, W, 3) uint8 as np.save does. It does not keep the fps."""

    def write_header(length):  # equally long for any length: NumPy leaves room for it to grow
        header = {"descr": "|u1", "fortran_order": False, "shape": (length, *frame.shape)}
        np.lib.format.write_array_header_1_0(file, header)

    with atomic_write(path) as file:
        for length, frame in enumerate(frames, start=1):
            if length == 1:
                write_header(length)
            file.write(np.ascontiguousarray(frame))
        file.seek(0)
        write_header(length)


def save_png(path, frames, fps=25):
    """Write a folder of frame-00000.png and so on, which do not keep the fps.

    In an existing folder, old frames are removed first; other files stay.
    """
    path.mkdir(exist_ok=True)
    for old in path.glob("frame-*.png"):
        old.unlink()
    for k, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"frame-{k:05d}.png")


def video_grid(videos, columns=4):
    """Videos side by side, with 2 white pixels around each.

    videos: (B, K, S, S, 3) uint8; returns (K, H, W, 3) uint8.
    """
    frames = torch.from_numpy(videos).permute(1, 0, 4, 2, 3)
    grids = [make_grid(f, columns, padding=2, pad_value=255) for f in frames]
    return torch.stack(grids).permute(0, 2, 3, 1).numpy()


def enlarge(frame, scale, resample="nearest"):
    """A frame, (H, W, 3) uint8, `scale` times as large (a whole number).

    resample: "nearest" or "lanczos".
    """
    if scale == 1:
        return frame
    size = frame.shape[1] * scale, frame.shape[0] * scale
    return cv2.resize(frame, size, interpolation=RESAMPLE[resample])


class LabelledGrid:
    """A grid of R × C videos, with labels above and at the left.

    rows, columns: the R labels at the left and the C labels above; size: S, the videos' height and
    width in pixels. Raises UserError if the grid is larger than 16,384 pixels.
    """

    def __init__(self, rows, columns, size):
        font = ImageFont.load_default(max(9, size // 8))
        self.columns, self.margin = len(columns), sum(font.getmetrics()) + 4
        height, width = (self.margin + 2 + n * (size + 2) for n in (len(rows), len(columns)))
        if max(height, width) > MAX_PIXELS:
            size = f"{width}×{height} pixels"
            raise UserError(f"a grid of {size} is too large ({MAX_PIXELS}): take a smaller --scale")

        def render(labels):
            """Labels side by side, each in the middle above its video."""
            strip = Image.new("RGB", (2 + len(labels) * (size + 2), self.margin), "white")
            for i, label in enumerate(labels):
                centre = 2 + i * (size + 2) + size / 2, self.margin / 2
                ImageDraw.Draw(strip).text(centre, label, "black", font, anchor="mm")
            return strip

        grid = Image.new("RGB", (width + width % 2, height + height % 2), "white")  # even for MP4
        grid.paste(render(columns), (self.margin, 0))
        grid.paste(render(rows[::-1]).transpose(Image.Transpose.ROTATE_90), (0, self.margin))
        self.empty = np.array(grid)

    def frame(self, cells):
        """The grid with a frame in each cell. cells: R * C frames, (S, S, 3) uint8, by rows."""
        (cells,) = video_grid(np.stack(list(cells))[:, None], self.columns)
        height, width, _ = cells.shape
        grid = self.empty.copy()
        grid[self.margin : self.margin + height, self.margin : self.margin + width] = cells
        return grid
