"""Checkpoints on disk: whole or not at all, checked when read, and the one before kept.

A folder holds checkpoint.pt, the newest; checkpoint-previous.pt, the one before it; and, where
asked for, checkpoint-005000.pt and so on. Each is what torch.save writes, then a line with the
SHA-256 of that, which torch.load passes over.
"""

import errno
import hashlib
import os
import re
import shutil
import warnings

import torch

from utils import UserError, is_out_of_memory, what_failed, whole_file

FORMAT = 3  # of the content
MARK = b"\nmocogan checkpoint, sha256 "
TAIL = len(MARK) + 64 + 1  # the line after the content, in bytes
NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"


class Damaged(Exception):
    """Why a file gives no checkpoint."""


class HashingWriter:
    """A file that is written to, and the SHA-256 of what was."""

    def __init__(self, file):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data):
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def write(path, content):
    """Write `content`, a dict of plain values and tensors, to `path`, whole or not at all.

    Raises OSError.
    """
    with whole_file(path) as file:
        write_to(file, content)


def write_to(file, content):
    hashing = HashingWriter(file)
    try:
        torch.save({"format": FORMAT, **content}, hashing)
    except RuntimeError as error:
        # A full disk, a second Ctrl-C: torch.save ends the file it has in hand, which fails, too.
        raise error.__context__ or error from None
    file.write(MARK + hashing.sha256.hexdigest().encode() + b"\n")


def read(path):
    """Read what `write` wrote, its tensors onto the CPU. Nothing in the file is ever run.

    Raises Damaged if it is not whole or no checkpoint of this program, UserError if it is one of
    another version, OSError if it cannot be read.
    """
    sha256, left = hashlib.sha256(), path.stat().st_size - TAIL
    try:
        with open(path, "rb") as file:
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                sha256.update(block)
                left -= len(block)
            tail = file.read()
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise Damaged("a part of the disk cannot be read") from None
    if not tail.startswith(MARK):
        raise Damaged("not a checkpoint of this version of the program, or one cut short")
    if tail != MARK + sha256.hexdigest().encode() + b"\n":
        raise Damaged("damaged, its checksum does not match")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises a dozen kinds for what it does not take
        if is_out_of_memory(error):
            raise
        raise Damaged("refused, it holds more than plain values and tensors") from None
    ours = isinstance(content, dict)
    if not ours or not all(isinstance(content.get(name), int) for name in ("format", "epoch")):
        raise Damaged("not a checkpoint of this program")
    if content["format"] != FORMAT:
        age = "a newer" if content["format"] > FORMAT else "an older"
        raise UserError(
            f"{path}: of {age} version of this program (format {content['format']}; "
            f"this one reads {FORMAT}): use that version"
        )
    return content


class Checkpoints:
    """The checkpoints of a run, in `folder`.

    keep: how many numbered ones to keep besides the newest and the one before it.
    `good`: the path and the epoch of the newest that is known to be whole; None where none is.
    """

    def __init__(self, folder, keep=0):
        self.folder, self.keep = folder, keep
        self.newest, self.previous = folder / NEWEST, folder / PREVIOUS
        self.good = None

    def number(self, epoch):
        """The path of the numbered checkpoint of that epoch."""
        return self.folder / f"checkpoint-{epoch:06d}.pt"

    def numbered(self):
        """The numbered checkpoints that are there: a dict from their epochs to their paths."""
        digits = (
            path.stem.removeprefix("checkpoint-") for path in self.folder.glob("checkpoint-*")
        )
        paths = {int(d): self.number(int(d)) for d in sorted(digits) if re.fullmatch("[0-9]+", d)}
        return {epoch: paths[epoch] for epoch in sorted(paths) if paths[epoch].is_file()}

    def there(self):
        """The paths of the checkpoints that are there: checkpoint.pt, then the latest first."""
        others = [path for path in (self.previous, *self.numbered().values()) if path.is_file()]
        others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        return [self.newest] * self.newest.is_file() + others

    def load(self):
        """The content of the newest checkpoint that is whole, and a line for each that is not.

        Raises UserError if none is whole, if one cannot be read, or if the newest whole one is of
        another version.
        """
        damaged = [] if self.newest.is_file() else [f"{self.newest} is not there"]
        for path in self.there():
            try:
                content = read(path)
            except Damaged as reason:
                damaged.append(f"{path}: {reason}")
                continue
            except OSError as error:
                raise UserError(f"cannot read {what_failed(error)}") from None
            self.good = path, content["epoch"]
            return content, damaged
        raise UserError(
            f"{'; '.join(damaged)}; leave --pre-train out to start anew (they are moved, not lost)"
        )

    def save(self, content, number=True):
        """Make `content` the newest checkpoint. Raises OSError; the old ones are then untouched.

        number: whether it is one of those that `keep` counts and keeps. At every moment the newest
        is whole under its own name, the old one or the new.
        """
        with whole_file(self.newest) as file:
            write_to(file, content)
            # Before the new one takes its name, so that the old one is never without. But one that
            # was found damaged is not kept.
            if self.good and self.good[0] == self.newest:
                link_or_copy(self.newest, self.previous)
        self.good = self.newest, content["epoch"]
        if self.keep and number:
            link_or_copy(self.newest, self.number(content["epoch"]))
            up_to_now = [p for epoch, p in self.numbered().items() if epoch <= content["epoch"]]
            for old in up_to_now[: -self.keep]:
                old.unlink()

    def safe(self):
        """What is safe, for people."""
        if self.good and self.good[0].is_file():
            return "{} of epoch {} is safe".format(*self.good)
        if self.there():
            return f"the checkpoints in {self.folder} are untouched"
        return f"there is no checkpoint in {self.folder}"


def link_or_copy(source, target):
    """Give `source` a second name, `target`, in place of what has that name; else copy it."""
    link = target.with_name(target.name + ".part")
    link.unlink(missing_ok=True)
    try:
        os.link(source, link)
    except OSError:  # a file system without links: Google Drive's, exFAT
        with open(source, "rb") as old, whole_file(target) as new:
            shutil.copyfileobj(old, new)
    else:
        os.replace(link, target)
        link.unlink(missing_ok=True)  # which stays where both are names of one file already
