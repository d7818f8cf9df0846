"""Checkpoints on disk: whole or not at all, checked when read, and the one before kept.

A folder holds checkpoint.pt, the newest; checkpoint-previous.pt, the one before it; and, where
asked for, checkpoint-005000.pt and so on. Each is what torch.save writes, then a line with the
SHA-256 of that, which torch.load passes over.
"""

import hashlib
import os
import re
import shutil
import warnings

import torch

from utils import UserError, whole_file

FORMAT = 3  # of the content
MARK = b"\nmocogan checkpoint, sha256 "
TAIL = len(MARK) + 64 + 1  # the line after the content, in bytes
NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"
NUMBERED = re.compile(r"checkpoint-(\d{6,})\.pt")


class Damaged(Exception):
    """Why a file gives no checkpoint."""


class HashingWriter:
    """A file that is written to, and the SHA-256 of what was."""

    def __init__(self, file):
        self.file, self.sha256, self.error = file, hashlib.sha256(), None

    def write(self, data):
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:  # torch.save would raise something of its own
            self.error = error
            raise

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
    except Exception:
        if hashing.error:
            raise hashing.error from None
        raise
    file.write(MARK + hashing.sha256.hexdigest().encode() + b"\n")


def read(path):
    """Read what `write` wrote, its tensors onto the CPU. Nothing in the file is ever run.

    Raises Damaged if it is not whole or no checkpoint of this program, UserError if it is one of
    another version, OSError if it cannot be read.
    """
    sha256, left = hashlib.sha256(), path.stat().st_size - TAIL
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            sha256.update(block)
            left -= len(block)
        tail = file.read()
    if not tail.startswith(MARK):
        raise Damaged("not a checkpoint of this version of the program, or one cut short")
    if tail != MARK + sha256.hexdigest().encode() + b"\n":
        raise Damaged("damaged, its checksum does not match")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception:  # torch.load raises a dozen kinds for what it does not take
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

    def numbered(self):
        """The numbered checkpoints: a dict from their epochs to their paths, by epoch."""
        names = map(NUMBERED.fullmatch, os.listdir(self.folder) if self.folder.is_dir() else ())
        return {
            epoch: self.folder / f"checkpoint-{epoch:06d}.pt"
            for epoch in sorted(int(name[1]) for name in names if name)
        }

    def there(self):
        """The paths of the checkpoints that are there, the newest first."""
        paths = self.newest, self.previous, *reversed(self.numbered().values())
        return [path for path in paths if path.is_file()]

    def load(self):
        """The content of the newest checkpoint that is whole, and a line for each that is not.

        Raises UserError if none is whole, or if the newest whole one is of another version.
        """
        damaged = []
        for path in self.there():
            try:
                content = read(path)
            except Damaged as reason:
                damaged.append(f"{path}: {reason}")
                continue
            self.good = path, content["epoch"]
            return content, damaged
        raise UserError("; ".join(damaged) or f"{self.newest} is not there")

    def save(self, content):
        """Make `content` the newest checkpoint. Raises OSError; the old ones are then untouched.

        At every moment the newest or the one before is whole under its own name.
        """
        with whole_file(self.newest) as file:
            write_to(file, content)
            if self.good and self.good[0] == self.newest:  # one found damaged is not kept
                link_or_copy(self.newest, self.previous)
        self.good = self.newest, content["epoch"]
        if self.keep:
            link_or_copy(self.newest, self.folder / f"checkpoint-{content['epoch']:06d}.pt")
            up_to_now = [p for epoch, p in self.numbered().items() if epoch <= content["epoch"]]
            for old in up_to_now[: -self.keep]:
                old.unlink()

    def safe(self):
        """What is safe, for people."""
        if self.good:
            return "{} of epoch {} is safe".format(*self.good)
        if self.there():
            return f"the checkpoints in {self.folder} are untouched"
        return "no checkpoint had been made"


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
