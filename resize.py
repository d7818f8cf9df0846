"""Turn video clips into fixed 96×96 frame arrays for main.py.

    python resize.py                  # videos in raw_data/<action>/ (or in resized_data/ itself)
    python resize.py --download       # fetch the Weizmann clips into raw_data/ first
    python resize.py --synthetic      # no data at all: draw people doing the ten actions

Each clip becomes resized_data/<action>/<clip>.npy: uint8, (n_frames, 96, 96, 3), RGB. Running it
again only does what is new or has changed.
"""

import argparse
import contextlib
import json
import os
import shutil
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # a bad file gets our line, not FFmpeg's
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")

import cv2
import numpy as np
from numpy.lib import format as npy
from tqdm import tqdm

import synthetic
from utils import (
    Parser,
    UserError,
    alone_in,
    files_below,
    number,
    one_line_errors,
    open_array,
    progress_bar,
    whole_file,
)

VIDEOS = {".avi", ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".gif", ".mpg", ".mpeg", ".wmv"}
VIDEOS |= {".3gp", ".flv", ".mts", ".m2ts", ".ts", ".ogv"}
STRIPS = {".jpg", ".jpeg", ".png"}
MIN_FRAMES = 16  # the window of the video discriminator
RECORD = "clips.jsonl"  # in --out: what each array was made from
DRAWN = "synthetic"  # the source of an array, there, that --synthetic drew

URL = "https://www.wisdom.weizmann.ac.il/~vision/VideoAnalysis/Demos/SpaceTimeActions/DB"
ACTIONS = "bend", "jack", "jump", "pjump", "run", "side", "skip", "walk", "wave1", "wave2"


# ---------------------------------------------------------------- geometry


def resize_frame(frame, size=96):
    """Scale and crop one frame, (H, W, 3) uint8, to (size, size, 3), as the published clips were.

    Scaled to height 1.5 size (or to width `size`, where it would be narrower), then the centre is
    cut. A 180×144 frame at size 96 is only cut: left 42, top 24. A square frame is scaled whole.
    """
    height, width = frame.shape[:2]
    if height == width:
        new = size, size
    else:
        new = round(width * size * 3 / 2 / height), size * 3 // 2
        if new[0] < size:
            new = size, round(height * size / width)
    if new != (width, height):
        shrinks = new[0] < width
        frame = cv2.resize(frame, new, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    return frame[top : top + size, left : left + size]


# ---------------------------------------------------------------- reading


class Unusable(Exception):
    """Why a file gives no clip."""


def read_frames(path):
    """Yield the frames of a video or of an image strip: (H, W, 3) uint8, RGB.

    Raises Unusable if `path` cannot be read as what its name says.
    """
    return read_strip(path) if path.suffix.lower() in STRIPS else read_video(path)


def read_video(path):
    """Yield the frames of a video file or GIF, turned upright as its metadata says."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # OpenCV ends the process on such a name
        raise Unusable("its name is not valid UTF-8: rename it") from None
    with open(path, "rb"):  # says what is wrong with it, where OpenCV only says no
        capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)
    try:
        if not capture.isOpened():
            raise Unusable("not a video that can be read")
        read, promised = 0, capture.get(cv2.CAP_PROP_FRAME_COUNT)
        while True:
            ok, frame = capture.read()
            if not ok:
                break
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            read += 1
        if 0 < read < 0.9 * promised:
            tqdm.write(f"note: {path}: only {read} of {promised:.0f} frames could be read")
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


# ---------------------------------------------------------------- writing


@dataclass
class Source:
    """What one array is made from."""

    name: str  # for people
    identity: list  # plain values; the array is made anew when they change
    frames: Callable  # called with nothing, gives the frames


def write_clip(path, frames, size=96, every=1):
    """Resize every `every`-th of `frames` and write them to `path` as one array.

    Frame by frame, so that a clip of any length takes little memory; whole or not at all. Returns
    the number of frames written. Raises Unusable if there are fewer than 16.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    seen = kept = 0
    with whole_file(path) as file:

        def write_header(n):  # as long for any n: NumPy leaves room for the first axis to grow
            file.seek(0)
            shape = {"descr": "|u1", "fortran_order": False, "shape": (n, size, size, 3)}
            npy.write_array_header_1_0(file, shape)

        write_header(0)
        for frame in frames:
            if seen % every == 0:
                file.write(np.ascontiguousarray(resize_frame(frame, size)))
                kept += 1
            seen += 1
        if seen == 0:
            raise Unusable("has no frames")
        if kept < MIN_FRAMES:
            of = f" (every {every} of {seen})" if every > 1 else ""
            raise Unusable(f"{kept} frames{of}, shorter than {MIN_FRAMES}")
        write_header(kept)
    return kept


def find_clips(raw, out):
    """Find the videos and strips below `raw`, and those lying in `out` itself.

    Returns a dict from the path of the array, below `out`, to its Source, and a list of the files
    left out: pairs of name and reason.
    """
    sources, skipped = {}, []
    roots = {raw.resolve(): raw, out.resolve(): out}  # one, if they are the same folder
    for real, root in roots.items():
        others = [other for other in roots if other != real and other.is_relative_to(real)]
        for path in files_below(root):
            if any(path.resolve().is_relative_to(other) for other in others):
                continue  # it is in that folder's own walk
            if path.suffix.lower() not in VIDEOS | STRIPS or not path.is_file():
                continue
            array = path.relative_to(root).with_suffix(".npy")
            if array in sources:
                reason = f"would make the same array as {sources[array].name}: rename one"
                skipped.append((path, reason))
                continue
            about = path.stat()
            identity = [path.relative_to(root).as_posix(), about.st_size, about.st_mtime_ns]
            sources[array] = Source(str(path), identity, partial(read_frames, path))
    return sources, skipped


def convert(sources, out, size=96, every=1):
    """Write an array for each of `sources` (see `find_clips`), unless `out` has it already.

    Returns a dict from the arrays to their numbers of frames, and a list of those left out: pairs
    of name and reason.
    """
    record = read_record(out)
    done, skipped = {}, []
    with open(out / RECORD, "a") as file:
        for array, source in progress_bar(sources.items(), desc="resizing", unit="clip"):
            made_from = {"source": source.identity, "size": size, "every": every}
            frames = count_frames(out / array, size) if record.get(array) == made_from else None
            if frames is None:
                try:
                    frames = write_clip(out / array, source.frames(), size, every)
                except (Unusable, OSError, cv2.error) as reason:
                    skipped.append((source.name, reason))
                    continue
                file.write(json.dumps([array.as_posix(), made_from]) + "\n")
                file.flush()
            done[array] = frames
    write_record(out, read_record(out))
    return done, skipped


def count_frames(path, size):
    """The number of frames in a whole array of frames of that size; None if it is not one."""
    try:
        array = open_array(path)
    except ValueError:
        return None
    return len(array) if array.dtype == np.uint8 and array.shape[1:] == (size, size, 3) else None


def read_record(out):
    """What the arrays in `out` were made from: a dict by their paths, of those that are there."""
    record = {}
    with contextlib.suppress(FileNotFoundError), open(out / RECORD, errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError, RecursionError):  # a damaged line
                name, made_from = json.loads(line)
                array = Path(name)
                sound = isinstance(made_from, dict) and isinstance(made_from.get("source"), list)
                if sound and not array.is_absolute() and ".." not in array.parts:
                    record[array] = made_from
    return {array: made_from for array, made_from in record.items() if (out / array).is_file()}


def write_record(out, record):
    with whole_file(out / RECORD) as file:
        for array, made_from in record.items():
            file.write(json.dumps([array.as_posix(), made_from]).encode() + b"\n")


# ---------------------------------------------------------------- downloading


def download(raw, url=URL):
    """Fetch the ten zips of the Weizmann data set into `raw` and unpack them there, by action.

    What is there already is not fetched again; a download that was cut off is taken up where it
    stopped. Raises UserError where the server cannot be reached or gives no sound archive.
    """
    raw.mkdir(parents=True, exist_ok=True)
    for action in ACTIONS:
        archive = raw / f"{action}.zip"
        if not archive.exists():
            fetch(f"{url.rstrip('/')}/{action}.zip", archive)
        unpack(archive, raw / action)


def fetch(url, path, tries=3):
    """Download `url` to `path`, by way of `<path>.part`, which a later call goes on with."""
    part = path.with_name(path.name + ".part")
    for left in reversed(range(tries)):
        try:
            fetch_rest(url, part)
            break
        except (OSError, HTTPException, ValueError) as error:  # URLError, timeouts: OSErrors
            for_good = isinstance(error, ValueError) or getattr(error, "code", 500) < 500
            if left and not for_good:
                continue
            reason = " ".join(str(getattr(error, "reason", None) or error).split())
            raise UserError(
                f"cannot download {url}: {reason}; run the same again to go on where it stopped, "
                "name a mirror with --url, or do without the data with --synthetic"
            ) from None
    os.replace(part, path)


def fetch_rest(url, part):
    """Append to `part` what it lacks of `url`. Raises OSError if the connection ends early."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(
        url, headers={"User-Agent": "mocogan", "Range": f"bytes={have}-"}
    )
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send: it was all there
            return
        raise
    with response, open(part, "ab") as file:
        if response.status != 206:  # the server sends all of it
            file.truncate(have := 0)
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        name = part.name.removesuffix(".part")
        with progress_bar(desc=name, initial=have, total=total, unit="B", unit_scale=True) as bar:
            while block := response.read(1 << 16):
                have += file.write(block)
                bar.update(len(block))
        if total is not None and have < total:
            raise ConnectionError(f"the connection ended after {have} of {total} bytes")


def is_sound(archive):
    """Whether `archive` is a zip whose members can all be read and match their checksums."""
    try:
        with zipfile.ZipFile(archive) as members:
            return members.testzip() is None
    except Exception:  # zipfile raises a dozen kinds for a damaged archive
        return False


def unpack(archive, folder):
    """Unpack a zip into `folder`, but for what is there; each file whole or not at all.

    Raises UserError if the archive is damaged, which is then removed, or if a member would land
    outside `folder`.
    """
    if not is_sound(archive):
        archive.unlink()
        raise UserError(f"{archive}: not a sound zip, removed; run the same again to fetch it")
    with zipfile.ZipFile(archive) as members:
        files = [member for member in members.infolist() if not member.is_dir()]
        for member in files:
            target = folder / member.filename
            if not target.resolve().is_relative_to(folder.resolve()):
                raise UserError(
                    f"{archive}: refused, {member.filename} would land outside {folder}"
                )
        for member in files:
            target = folder / member.filename
            if target.exists() and target.stat().st_size == member.file_size:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with members.open(member) as source, whole_file(target) as file:
                shutil.copyfileobj(source, file)


# ---------------------------------------------------------------- synthetic clips


def synthetic_clips():
    """The nine drawn people doing the ten actions, as `convert` takes them."""
    return {
        Path(action, f"{person.name}_{action}.npy"): Source(
            f"{person.name}_{action}",
            [DRAWN, synthetic.VERSION],
            partial(synthetic.draw_clip, person, action),
        )
        for action in ACTIONS
        for person in synthetic.PEOPLE
    }


# ---------------------------------------------------------------- the command


def frame_size(text):
    """An argparse type: 32, 48, 64 ... 256."""
    size = number(int, 32, 256)(text)
    if size % 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 16")
    return size


def parse(argv=None):
    parser = Parser(prog="resize.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--raw", type=Path, default="raw_data", help="folder of videos, in a subfolder an action")
    add("--out", type=Path, default="resized_data", help="folder for the arrays")
    add("--size", type=frame_size, default=96, help="side of a frame: a multiple of 16, 32 to 256")
    add("--every", type=number(int, 1), default=1, help="keep every Nth frame")
    add("--download", action="store_true", help="fetch the Weizmann clips into --raw first")
    add("--url", default=URL, help="with --download: where the ten zips are")
    add("--synthetic", action="store_true", help="draw clips instead of reading any")
    args = parser.parse_args(argv)
    if args.download and args.synthetic:
        parser.error("--download and --synthetic do not go together: choose one")
    if not args.url.startswith(("http://", "https://")):
        parser.error(f"--url {args.url}: must begin with http:// or https://")
    return parser, args


def make_arrays(args):
    if args.download:
        with alone_in(args.raw):
            download(args.raw, args.url)
    if args.synthetic:
        sources, skipped = synthetic_clips(), []
        if others := [array for array in arrays_in(args.out) if array not in sources]:
            raise UserError(
                f"--synthetic: {args.out} holds other clips, such as {others[0]}; "
                "name another folder with --out"
            )
    else:
        sources, skipped = find_clips(args.raw, args.out)
        if not sources:
            raise UserError(
                f"no videos in {args.raw}; put some into a folder for each action there, "
                "fetch the Weizmann clips with --download, or draw some with --synthetic"
            )
    with alone_in(args.out):
        done, failed = convert(sources, args.out, args.size, args.every)
        skipped += failed
        for name, reason in skipped:
            print(f"skipped {name}: {reason}")
        if not done:
            raise UserError(
                f"none of {len(skipped)} files gave a clip ({skipped[0][0]}: {skipped[0][1]}); "
                "try others, or --download, or --synthetic"
            )
        remove_drawn(args.out, keep=done)
    actions = {array.parts[0] for array in done if len(array.parts) > 1}
    print(
        f"{len(done)} clips, {sum(done.values())} frames, {len(actions)} actions → {args.out} "
        f"({len(skipped)} skipped)"
    )
    if others := [array for array in arrays_in(args.out) if array not in done]:
        print(
            f"note: {args.out} also holds {len(others)} that these clips did not give, such as "
            f"{others[0]}; main.py trains on them too, unless you delete them"
        )


def arrays_in(out):
    """The paths of all arrays in `out`, below it."""
    return [path.relative_to(out) for path in files_below(out) if path.suffix == ".npy"]


def remove_drawn(out, keep):
    """Remove the arrays that --synthetic drew, but for those in `keep`: real clips have come."""
    record = read_record(out)
    drawn = [a for a, made_from in record.items() if made_from["source"][:1] == [DRAWN]]
    gone = [array for array in drawn if array not in keep]
    for array in gone:
        (out / array).unlink()
    if gone:
        print(f"removed {len(gone)} clips that --synthetic had drawn in {out}")


def main(argv=None):
    parser, args = parse(argv)
    with one_line_errors(parser):
        make_arrays(args)


if __name__ == "__main__":
    main()
