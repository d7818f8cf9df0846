"""Reading and writing of videos, and grids of several videos in one.

A video is an iterable of frames, (H, W, 3) uint8, RGB, all of one size. Frames are read and written
one at a time, so that a video of any length needs little memory; only a GIF is held as a whole.
"""

import contextlib
import errno
import itertools
import os
import re
import threading
from pathlib import Path
from subprocess import PIPE, Popen

import cv2
import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from utils import UserError, atomic_write

Image.MAX_IMAGE_PIXELS = None  # phones make larger photos
IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
FORMATS = ("gif", "mp4", "png", "npy")
GIF_FPS = 50  # browsers slow down what is faster
PALETTE_BYTES = 2**23  # of the first frames, from which a GIF's colours are chosen
# What FFmpeg would show as text, or wait for, and what need not be tried.
NO_VIDEOS = {".txt", ".nfo", ".diz", ".asc", ".ans", ".art", ".ice", ".vt", ".idf", ".bin"}
NO_VIDEOS |= {".m3u8", ".m3u", ".mpd", ".ffconcat", ".part", ".json", ".csv", ".xml"}
MAX_PIXELS = 16384  # the largest width and height of H.264


class Unusable(Exception):
    """Why a file gives no clip."""


class FrameReader:
    """Iterates over the frames of a clip: (H, W, 3) uint8, RGB.

    path: a video, read as FFmpeg shows it (its default track, upright, deinterlaced, with square
    pixels), an image strip (square frames, side by side or one below the other) or a folder of
    images, ordered by the numbers in their names. fps: resample a video to this rate; None: take
    every frame that can be decoded. frames: an iterable to be taken instead of what is in `path`.

    Attributes, set while it reads: `times`, when a video shows each of its frames, in seconds, and
    `done`, the part that FFmpeg has read, 0 to 1. Iterating raises Unusable if it cannot be read.
    """

    def __init__(self, path, fps=None, frames=None):
        self.path, self.fps, self.frames, self.times, self.done = path, fps, frames, [], 0

    def __iter__(self):
        try:
            if self.frames is not None:
                yield from self.frames
            elif self.path.is_dir():
                yield from self._read_folder()
            elif self.path.suffix.lower() in NO_VIDEOS:
                raise Unusable("not a video")
            elif self.path.suffix.lower() in IMAGES and image_kind(self.path) != "animation":
                yield from read_strip(self.path)
            else:
                yield from self._read_video()
        except (OSError, cv2.error) as error:
            raise Unusable(getattr(error, "strerror", None) or str(error).strip()) from None

    def has_frames(self):
        """Whether it has two frames: it is neither a photo, nor unreadable."""
        with contextlib.suppress(Unusable):
            return len(list(itertools.islice(self, 2))) == 2

    def _read_folder(self):
        paths = [path for path in self.path.glob("[!.]*") if path.suffix.lower() in IMAGES]
        shape = None
        paths.sort(key=lambda p: [(a, int(n or 0)) for a, n in re.findall(r"(\D*)(\d*)", p.name)])
        for k, path in enumerate(paths, start=1):
            image = read_image(path)
            shape = shape or image.shape
            if image.shape != shape:
                raise Unusable(f"images of different sizes, such as {path.name}")
            self.done = k / len(paths)
            yield image

    def _read_video(self):
        open(self.path, "rb").close()  # its OSError says more than FFmpeg does
        filters = "bwdif=mode=send_frame:deint=interlaced," + f"fps={self.fps}," * bool(self.fps)
        filters += "scale=iw*sar:ih,showinfo=checksum=0"
        command = [ffmpeg(), "-nostdin", "-nostats", "-i", f"file:{self.path}", "-vf", filters]
        command += ["-fps_mode", "passthrough", "-pix_fmt", "rgb24"]  # every frame, 8 bits
        command += ["-c:v", "ppm", "-f", "image2pipe", "-"]
        self.times, frame = [], None
        with Popen(command, stdout=PIPE, stderr=PIPE) as process:
            listener = threading.Thread(target=self._listen, args=[process.stderr], daemon=True)
            listener.start()
            try:
                while process.stdout.readline():  # a PPM: "P6", width and height, 255, pixels
                    width, height = map(int, process.stdout.readline().split())
                    process.stdout.readline()
                    pixels = process.stdout.read(height * width * 3)
                    if len(pixels) < height * width * 3:
                        break  # it crashed on a damaged file
                    frame = np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
                    yield frame
                if process.wait() == -9:
                    raise Unusable("FFmpeg was killed: is there enough memory?")
            finally:
                process.kill()
                listener.join()
        if frame is None:
            raise Unusable("not a video that can be read")

    def _listen(self, stderr):
        """Take from what FFmpeg says how long the video is, and the time of each frame."""
        duration = float("inf")
        for line in stderr:
            if match := re.match(rb"\[Parsed_showinfo.* pts_time:(-?\d+\.?\d*)", line):
                self.times.append(float(match[1]))
                self.done = min(1, self.times[-1] / duration)
            elif match := re.match(rb" +Duration: (\d+):(\d+):(\d+\.\d+)", line):
                hours, minutes, seconds = map(float, match.groups())
                duration = 3600 * hours + 60 * minutes + seconds or duration

    def rates(self):
        """The lowest and the highest rate of 16 frames in a row, frames a second; None: unknown."""
        seconds = np.subtract(self.times[15:], self.times[:-15])
        seconds = seconds[seconds > 0]
        return (15 / seconds.max(), 15 / seconds.min()) if seconds.size else None


def image_kind(path):
    """What an image is: a "strip" of frames, an "animation" or a "photo"; None if unreadable."""
    with contextlib.suppress(Exception), Image.open(path) as image:  # a dozen kinds
        if image.format in ("PNG", "WEBP") and image.is_animated:
            return "animation"
        return "strip" if max(image.size) >= 4 * min(image.size) else "photo"


def read_strip(path):
    """Yield the frames of an image strip, (S, S, 3) uint8, RGB. Raises Unusable, OSError."""
    image = read_image(path)
    height, width = image.shape[:2]
    side = min(height, width)
    if max(height, width) % side:
        raise Unusable(f"an image of {width}×{height}, no strip of square frames")
    yield from np.split(image, max(height, width) // side, axis=1 if width > height else 0)


def read_image(path):
    """An image file: (H, W, 3) uint8, RGB. Raises Unusable, or OSError if it cannot be opened."""
    content = np.frombuffer(path.read_bytes(), np.uint8)
    image = cv2.imdecode(content, cv2.IMREAD_COLOR) if len(content) else None
    if image is None:
        raise Unusable(f"{path.name} is not an image that can be read")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def ffmpeg():
    """The path of the FFmpeg program. Raises UserError if there is none."""
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise UserError("there is no ffmpeg here; install it, or imageio-ffmpeg anew") from None


def save_video(path, frames, fps=25):
    """Write a video in the format of its suffix: .gif, .mp4, .npy; none: a folder of PNGs.

    Raises UserError where the format cannot do it, OSError if it cannot be written.
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
    bt709 = "scale=out_color_matrix=bt709:out_range=tv,"
    bt709 += "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709"
    with atomic_write(path) as file:
        command = [ffmpeg(), "-v", "quiet", "-y", "-f", "image2pipe", "-c:v", "ppm"]
        command += ["-r", str(fps), "-i", "-", "-vf", bt709, "-pix_fmt", "yuv420p", "-crf", "18"]
        command += ["-movflags", "+faststart", "-f", "mp4", f"file:{os.path.abspath(file.name)}"]
        with contextlib.suppress(BrokenPipeError), Popen(command, stdin=PIPE) as process:
            for frame in frames:
                height, width, _ = frame.shape
                frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                process.stdin.write(b"P6 %d %d 255\n" % frame.shape[1::-1] + frame.tobytes())
        if process.returncode:
            raise OSError(errno.EIO, "ffmpeg could not write it; is the disk full?", str(path))


def save_npy(path, frames, fps=25):
    """Write the array (n_frames, H, W, 3) uint8 as np.save does. It does not keep the fps."""
    with atomic_write(path) as file:
        file.seek(128)  # past NumPy's header, which is as long for any number of frames
        for frame in frames:
            file.write(np.ascontiguousarray(frame))
        shape = (file.tell() - 128) // frame.nbytes, *frame.shape
        file.seek(0)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)


def save_png(path, frames, fps=25):
    """Write frame-00000.png and so on into a folder, in place of older ones, without the fps."""
    path.mkdir(exist_ok=True)
    for old in path.glob("frame-*.png"):
        old.unlink()
    for k, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"frame-{k:05d}.png")


def video_grid(videos, columns=4):
    """Videos, (B, K, S, S, 3) uint8, side by side, 2 white pixels apart: (K, H, W, 3) uint8."""
    from torchvision.utils import make_grid  # it takes seconds, and resize.py does not need it

    frames = torch.from_numpy(videos).permute(1, 0, 4, 2, 3)
    grids = [make_grid(f, columns, padding=2, pad_value=255) for f in frames]
    return torch.stack(grids).permute(0, 2, 3, 1).numpy()


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
