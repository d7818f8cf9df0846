"""Turn video clips into arrays of 96×96 frames for main.py.

    python resize.py                  # videos in raw_data/<action>/, or in resized_data/ itself
    python resize.py --download       # fetch the Weizmann clips into raw_data/ first
    python resize.py --synthetic      # no data at all: render people doing the ten actions

Each clip becomes resized_data/<action>/<clip>.npy: uint8, (n_frames, 96, 96, 3), RGB. Running it
again only does what is new or has changed.
"""

import itertools
import json
import socket
import zipfile
from pathlib import Path

import cv2
import numpy as np
import torch

import synthetic
import utils
from utils import Parser, UserError, number
from video import STRIPS, VIDEOS, Unusable, read_frames, save_npy

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # a bad file gets our line only

MIN_FRAMES = 16  # the window of the video discriminator
SYNTHETIC = Path(synthetic.__file__)  # the source of all synthetic clips
URL = "https://www.wisdom.weizmann.ac.il/~vision/VideoAnalysis/Demos/SpaceTimeActions/DB"
ACTIONS = ("bend", "jack", "jump", "pjump", "run", "side", "skip", "walk", "wave1", "wave2")


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


def resize_clip(frames, size=96, every=1):
    """Yield every `every`-th of `frames`, resized. Raises Unusable if that gives fewer than 16."""
    length = 0
    for frame in itertools.islice(frames, 0, None, every):
        yield resize_frame(frame, size)
        length += 1
    if length < MIN_FRAMES:
        raise Unusable(f"{length} frames, shorter than {MIN_FRAMES}")


def find_sources(raw, out):
    """Find the videos and strips below `raw`, and those in `out` itself.

    Returns a dict {path of an array, below `out`: (path of its source, frames still to be read)},
    and a list of the files left out: pairs of path and reason.
    """
    sources, skipped = {}, []
    roots = {raw.resolve(): raw, out.resolve(): out}  # one, if they are the same folder
    for resolved, root in roots.items():
        nested = [other for other in roots if resolved in other.parents]
        for path in utils.files_below(root) if root.is_dir() else []:
            if path.suffix.lower() not in VIDEOS | STRIPS:
                continue
            if any(path.resolve().is_relative_to(other) for other in nested):
                continue  # it is found there
            array = path.relative_to(root).with_suffix(".npy")
            if array in sources:
                reason = f"would make the same array as {sources[array][0]}: rename one"
                skipped.append((path, reason))
            else:
                sources[array] = path, read_frames(path)
    return sources, skipped


def synthetic_sources():
    """The nine synthetic people doing the ten actions, as `find_sources` gives real clips."""
    return {
        Path(action, f"{who.name}_{action}.npy"): (SYNTHETIC, synthetic.render_clip(who, action))
        for action in ACTIONS
        for who in synthetic.PEOPLE
    }


def convert(sources, out, size=96, every=1):
    """Write an array for each of `sources` (see `find_sources`), unless `out` has it already.

    Returns a dict from the paths of the arrays to their numbers of frames, and a list of the
    sources left out: pairs of path and reason. Raises OSError if an array cannot be written.
    """
    is_synthetic = any(path == SYNTHETIC for path, _ in sources.values())
    content = json.dumps({"size": size, "every": every, "synthetic": is_synthetic}).encode()
    settings = out / "settings.json"
    if not settings.exists() or settings.read_bytes() != content:
        settings.write_bytes(content)  # all arrays are older now, and are made again
    lengths, skipped = {}, []
    for array, (path, frames) in utils.progress_bar(sources.items(), desc="resizing", unit="clip"):
        try:
            if not is_up_to_date(out / array, size, newer_than=(path, settings)):
                (out / array).parent.mkdir(parents=True, exist_ok=True)
                save_npy(out / array, resize_clip(frames, size, every))
            lengths[array] = len(np.load(out / array, mmap_mode="r"))
        except (Unusable, cv2.error, OSError) as error:
            if isinstance(error, OSError) and error.filename != str(path):
                raise  # it is not the source that cannot be read: the disk is full, say
            reason = getattr(error, "strerror", None) or str(error).strip()
            skipped.append((array if path == SYNTHETIC else path, reason))
    return lengths, skipped


def is_up_to_date(path, size, newer_than):
    """Whether `path` is an intact array of frames of that size, newer than those files."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        intact = array.dtype == np.uint8 and array.shape[1:] == (size, size, 3)
        newest = max(file.stat().st_mtime_ns for file in newer_than)
        return intact and len(array) >= MIN_FRAMES and path.stat().st_mtime_ns > newest
    except Exception:  # NumPy raises a dozen kinds for a damaged file
        return False


def arrays_in(out):
    """The paths, below `out`, of all arrays there."""
    files = utils.files_below(out) if out.exists() else []
    return [path.relative_to(out) for path in files if path.suffix == ".npy"]


def download(raw, url=URL):
    """Download the ten zips of the Weizmann data set into `raw` and extract each to raw/<action>.

    Files that exist are neither downloaded nor extracted again. Raises UserError if a zip cannot be
    downloaded or is damaged, OSError if it cannot be extracted.
    """
    socket.setdefaulttimeout(30)  # seconds without anything from the server
    for action in ACTIONS:
        archive = raw / f"{action}.zip"
        source = f"{url.rstrip('/')}/{archive.name}"
        try:
            if not archive.exists():
                print(f"downloading {source}", flush=True)
                torch.hub.download_url_to_file(source, archive)
            if zipfile.ZipFile(archive).testzip():
                raise zipfile.BadZipFile("damaged zip")
        except Exception as error:  # urllib, http.client and zipfile raise two dozen kinds
            if not isinstance(error, OSError):  # then it is damaged
                archive.unlink(missing_ok=True)
            raise UserError(
                f"cannot download {source}: {getattr(error, 'reason', None) or error}; run the "
                "same again, name a mirror with --url, or do without the data with --synthetic"
            ) from None
        with zipfile.ZipFile(archive) as members:
            for member in members.infolist():
                path = raw / action / member.filename
                if not path.is_file() or path.stat().st_size != member.file_size:
                    members.extract(member, raw / action)


def main(argv=None):
    parser = Parser(prog="resize.py", description="Turn video clips into arrays for main.py.")
    add, size = parser.add_argument, "side of a frame: a multiple of 16, 32 to 256"
    add("--raw", type=Path, default="raw_data", help="folder of videos, a subfolder an action")
    add("--out", type=Path, default="resized_data", help="folder for the arrays")
    add("--size", type=int, choices=range(32, 257, 16), default=96, metavar="SIZE", help=size)
    add("--every", type=number(int, 1), default=1, help="keep every Nth frame")
    add("--url", default=URL, help="with --download: where the ten zips are")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--download", action="store_true", help="fetch the Weizmann clips into --raw first")
    add("--synthetic", action="store_true", help="render clips instead of reading any")
    args = parser.parse_args(argv)
    with utils.one_line_errors("resize.py"):
        make_arrays(args)


def make_arrays(args):
    if args.download:
        with utils.lock_folders(args.raw):
            download(args.raw, args.url)
    if args.synthetic:
        sources, skipped = synthetic_sources(), []
        if others := [array for array in arrays_in(args.out) if array not in sources]:
            message = f"--synthetic: {args.out} holds other clips, such as {others[0]}"
            raise UserError(f"{message}; name another folder with --out")
    else:
        sources, skipped = find_sources(args.raw, args.out)
    with utils.lock_folders(args.out):
        lengths, failed = convert(sources, args.out, args.size, args.every)
        skipped += failed
        for path, reason in skipped:
            print(f"skipped {path}: {reason}")
        if not lengths:
            raise UserError(
                f"no clips from {len(skipped)} files; put videos into a folder for each action in "
                f"{args.raw}, fetch Weizmann's with --download, or render some with --synthetic"
            )
        leftover = set(arrays_in(args.out)) & set(synthetic_sources()) - set(sources)
        for array in leftover:
            (args.out / array).unlink()
        if leftover:
            print(f"removed {len(leftover)} synthetic clips from {args.out}")
    actions = {array.parts[0] for array in lengths if len(array.parts) > 1}
    print(
        f"{len(lengths)} clips, {sum(lengths.values())} frames, {len(actions)} actions → "
        f"{args.out} ({len(skipped)} skipped)"
    )
    if others := [array for array in arrays_in(args.out) if array not in lengths]:
        print(
            f"note: {args.out} also holds {len(others)} arrays that this run did not make, such as "
            f"{others[0]}; main.py trains on them too, unless you delete them"
        )


if __name__ == "__main__":
    main()
