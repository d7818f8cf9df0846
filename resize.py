"""Turn video clips into arrays of 96×96 frames for main.py.

    python resize.py                  # videos in raw_data/<action>/, or in resized_data/ itself
    python resize.py --download       # fetch the Weizmann clips into raw_data/ first
    python resize.py --synthetic      # no data at all: render people doing the ten actions

Each clip becomes resized_data/<action>/<clip>.npy: uint8, (n_frames, 96, 96, 3), RGB. Running it
again only does what is new or has changed.
"""

import contextlib
import itertools
import json
import os
import shutil
import socket
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import torch

if __name__ == "__main__":  # a notebook may hold other modules of these names, or older ones
    for path in Path(__file__).parent.glob("*.py"):
        sys.modules.pop(path.stem, None)

import synthetic
import utils
from data import load_clip
from utils import Parser, UserError, number
from video import IMAGES, FrameReader, Unusable, image_kind, save_npy

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # a bad file gets our line only

MIN_FRAMES = 16  # the window of the video discriminator
SYNTHETIC = Path(synthetic.__file__)  # the source of all synthetic clips
URL = "https://www.wisdom.weizmann.ac.il/~vision/VideoAnalysis/Demos/SpaceTimeActions/DB"


def resize_frame(frame, size=96):
    """Scale and crop one frame, (H, W, 3) uint8, to (size, size, 3), as the published clips were.

    Scaled to height 1.5 size (or to width `size`, where it would be narrower), then the centre is
    cut. A 180×144 frame at size 96 is only cut: left 42, top 24. A square frame is scaled whole.
    """
    height, width = frame.shape[:2]
    scale = size / height if height == width else max(1.5 * size / height, size / width)
    new = round(width * scale), round(height * scale)
    frame = cv2.resize(frame, new, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    return frame[top : top + size, left : left + size]


def unzip(folder):
    """Extract each zip below `folder` once, into a folder of its name beside it.

    Returns those that are left out: pairs of path and reason. Raises OSError on a full disk.
    """
    skipped = []
    for path in utils.files_below(folder) if folder.is_dir() else []:
        target, part = path.with_suffix(""), path.with_name(f".{path.name}.part")
        if path.suffix.lower() != ".zip" or (target / ".extracted").exists():
            continue
        try:
            if target.exists():
                raise FileExistsError(f"{target} exists and is taken instead")
            print(f"extracting {path}", flush=True)
            with utils.lock_folders(path.parent):
                zipfile.ZipFile(path).extractall(part)
                (part / ".extracted").touch()
                part.rename(target)
            skipped += unzip(target)
        except Exception as error:  # zipfile raises a dozen kinds
            if getattr(error, "errno", None) in utils.DISK_FULL:
                raise
            skipped.append((path, str(error)))
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return skipped


def find_sources(raw, out, fps=None):
    """Find the clips below `raw`, and those in `out` itself: videos, strips, folders of frames.

    Returns a dict {path of an array, below `out`: the FrameReader of its source}, and a list of the
    files left out: pairs of path and reason.
    """
    sources, skipped = {}, []
    roots = {raw.resolve(): raw, out.resolve(): out}  # one, if they are the same folder
    for resolved, root in roots.items():
        nested = [other for other in roots if resolved in other.parents]
        ours = {".npy", ".json", ".jsonl"} if resolved == out.resolve() else set()
        folders = defaultdict(list)
        for path in utils.files_below(root) if root.is_dir() else []:
            if path.suffix.lower() not in ours | {".zip"}:
                folders[path.parent].append(path)
        for folder, paths in folders.items():
            if any(folder.resolve().is_relative_to(other) for other in nested):
                continue  # it is found there
            images = [path for path in paths if path.suffix.lower() in IMAGES]
            others = [path for path in paths if path.suffix.lower() not in IMAGES]
            kind = next(filter(None, map(image_kind, images)), None)
            are_photos = len(images) > 1 and kind == "photo"
            if are_photos and not any(FrameReader(path).has_frames() for path in others):
                images = [folder]  # they are the frames of a clip
            for path in [*others, *images]:
                relative = path.relative_to(root) if path != root else Path(path.resolve().name)
                array = Path(f"{relative}.npy") if path == folder else relative.with_suffix(".npy")
                other = sources.get(array)
                if other and other.has_frames():
                    skipped.append((path, f"{array} is made from {other.path}: rename one"))
                else:
                    sources[array] = FrameReader(path, fps)
                    skipped += [(other.path, "not a video")] if other else []
    return sources, skipped


def synthetic_sources():
    """The nine synthetic people doing the ten actions, as `find_sources` gives real clips."""
    sources = {}
    for action, who in itertools.product(synthetic.MOVEMENTS, synthetic.PEOPLE):
        frames = synthetic.render_clip(who, action)
        sources[Path(action, f"{who.name}_{action}.npy")] = FrameReader(SYNTHETIC, frames=frames)
    return sources


def convert(sources, out, size=96, every=1, fps=None):
    """Write an array for each of `sources` (see `find_sources`), unless `out` has it already.

    Returns two dicts by the paths of the arrays, their numbers of frames and, where they are known,
    the `FrameReader.rates` of their sources, and a list of the sources left out: pairs of path and
    reason. Raises OSError if an array cannot be written.
    """
    is_synthetic = any(reader.path == SYNTHETIC for reader in sources.values())
    content = {"size": size, "every": every, "fps": fps, "synthetic": is_synthetic}
    content, settings = json.dumps(content).encode(), out / "settings.json"
    if not settings.exists() or settings.read_bytes() != content:
        settings.write_bytes(content)  # all arrays are older now, and are made again
    lengths, skipped, rates = {}, [], {}
    style = "{l_bar}{bar}| {n:.1f}/{total} clips [{elapsed}<{remaining}]"
    bar = utils.progress_bar(total=len(sources), desc="resizing", miniters=0, bar_format=style)

    def resized_clip(reader):
        length = 0
        for frame in itertools.islice(reader, 0, None, every):
            bar.update(k + reader.done - bar.n)
            yield resize_frame(frame, size)
            length += 1
        if length < MIN_FRAMES:
            raise Unusable(f"{length} frames, shorter than {MIN_FRAMES}")

    with bar, open(out / "rates.jsonl", "a", buffering=1) as rates_file:
        for k, (array, reader) in enumerate(sources.items()):
            try:
                if not is_up_to_date(out / array, size, reader.path, settings):
                    (out / array).parent.mkdir(parents=True, exist_ok=True)
                    save_npy(out / array, resized_clip(reader))
                    rates_file.write(f"\n{json.dumps([str(array), reader.rates()])}\n")
                lengths[array] = len(np.load(out / array, mmap_mode="r"))
            except (Unusable, cv2.error) as error:
                (out / array).unlink(missing_ok=True)  # of other settings, or of another file
                skipped.append((array if is_synthetic else reader.path, str(error).strip()))
            bar.update(k + 1 - bar.n)
    for line in (out / "rates.jsonl").read_text().splitlines():  # of earlier runs, too
        with contextlib.suppress(TypeError, ValueError):  # empty, or cut off by a kill
            array, rates[array] = json.loads(line)
    rates = {array: rates[str(array)] for array in lengths if rates.get(str(array))}
    return lengths, rates, skipped


def is_up_to_date(path, size, source, settings):
    """Whether `path` is an intact array of frames of that size, newer than its source."""
    try:
        same_size = load_clip(path, MIN_FRAMES).shape[1] == size
        files = settings, source, *(source.iterdir() if source.is_dir() else ())
        # The later of two times: a file that is moved here may keep the time of its content.
        made, *times = (max(s.st_mtime_ns, s.st_ctime_ns) for s in map(os.stat, (path, *files)))
        return same_size and made > max(times)
    except (OSError, ValueError):
        return False


def arrays_in(out):
    """The paths, below `out`, of all arrays there."""
    return [path.relative_to(out) for path in utils.files_below(out) if path.suffix == ".npy"]


def download(raw, url=URL):
    """Download the ten zips of the Weizmann data set into `raw`, but for those that are there.

    Raises UserError if one cannot be downloaded or is damaged.
    """
    socket.setdefaulttimeout(30)  # seconds without anything from the server
    for action in synthetic.MOVEMENTS:
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


def main(argv=None):
    parser = Parser(prog="resize.py", description="Turn video clips into arrays for main.py.")
    add, size = parser.add_argument, "side of a frame: a multiple of 16, 32 to 256"
    add("--raw", type=Path, default="raw_data", help="folder of videos, a subfolder an action")
    add("--out", type=Path, default="resized_data", help="folder for the arrays")
    add("--size", type=int, choices=range(32, 257, 16), default=96, metavar="SIZE", help=size)
    add("--every", type=number(int, 1), default=1, help="keep every Nth frame")
    add("--fps", type=number(float, 0.1, 1000), help="resample videos to this frame rate")
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
    not_extracted = [] if args.synthetic else unzip(args.raw)
    with utils.lock_folders(args.out):
        if args.synthetic:
            sources, skipped = synthetic_sources(), []
            if others := [array for array in arrays_in(args.out) if array not in sources]:
                message = f"--synthetic: {args.out} holds other clips, such as {others[0]}"
                raise UserError(f"{message}; name another folder with --out")
        else:
            sources, skipped = find_sources(args.raw, args.out, args.fps)
        leftover = set(arrays_in(args.out)) & set(synthetic_sources()) - set(sources)
        for array in leftover if sources else ():
            (args.out / array).unlink()
        if leftover and sources:
            print(f"removed {len(leftover)} synthetic clips from {args.out}", flush=True)
        lengths, rates, failed = convert(sources, args.out, args.size, args.every, args.fps)
        skipped += not_extracted + failed
        for path, reason in skipped:
            print(f"skipped {path}: {reason}")
        if not lengths:
            raise UserError(
                f"no clips from {len(skipped)} files in {args.raw}; put videos there, in a folder "
                "for each action, fetch Weizmann's with --download, or render some with --synthetic"
            )
    actions = {array.parts[0] for array in lengths if len(array.parts) > 1}
    total = f"{len(lengths)} clips, {sum(lengths.values())} frames, {len(actions)} actions"
    print(f"{total} → {args.out} ({len(skipped)} skipped)")
    if others := [array for array in arrays_in(args.out) if array not in lengths]:
        print(f"note: main.py trains on {len(others)} older arrays, too: {args.out / others[0]} …")
    low, slowest = min(((low, array) for array, (low, _) in rates.items()), default=(1, ""))
    high, fastest = max(((high, array) for array, (_, high) in rates.items()), default=(1, ""))
    if high > 1.1 * low and not args.fps:
        differ = f"from {low:.3g} frames a second ({slowest}) to {high:.3g} ({fastest})"
        print(f"note: {differ}; --fps 25 would give all motion one speed")


if __name__ == "__main__":
    main()
