"""Checkpoints: written atomically, checked when loaded, and the previous one kept.

A folder holds checkpoint.pt, the newest; checkpoint-previous.pt; and, with --keep,
checkpoint-005000.pt and so on. Each is a file of torch.save.
"""

import zipfile

import torch

from utils import UserError, atomic_write, is_out_of_memory

FORMAT = 4  # the version of the content


class DamagedError(UserError):
    """A file that is no checkpoint."""


def save(path, content, previous=None):
    """Write `content`, a dict of plain values and tensors, as `atomic_write` does."""
    with atomic_write(path, previous) as file:
        try:
            torch.save({"format": FORMAT, **content}, file)
        except RuntimeError as error:
            # On a full disk, or at a second Ctrl-C, torch.save fails again as it closes the file.
            raise error.__context__ or error from None


def load(path):
    """Load what `save` wrote, tensors on the CPU. Nothing in the file is ever run.

    Raises DamagedError if it is damaged or no checkpoint of this program, UserError if it is of
    another version of it, OSError if it cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            if zipfile.ZipFile(file).testzip():  # torch.load does not look at the CRCs
                raise zipfile.BadZipFile
            file.seek(0)
            content = dict(torch.load(file, map_location="cpu", weights_only=True))
            version, _ = int(content["format"]), int(content["epoch"])
        except Exception as error:  # zipfile and torch raise a dozen kinds
            if is_out_of_memory(error):
                raise
            raise DamagedError(f"{path}: damaged, or not a checkpoint of this program") from error
    if version != FORMAT:
        raise UserError(f"{path}: of another version of this program ({version}, not {FORMAT})")
    return content


def peek_epoch(path):
    """The epoch of a checkpoint, without reading its tensors; infinite if it cannot be read."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["epoch"])
    except Exception:  # `load` reports it
        return float("inf")


class Checkpoints:
    """The checkpoints of a run, in `folder`.

    keep: how many numbered ones to keep besides the newest and the previous one.
    `last`: path and epoch of the last one that was saved or loaded; None if there is none.
    """

    def __init__(self, folder, keep=0):
        self.folder, self.keep, self.last = folder, keep, None
        self.newest, self.previous = folder / "checkpoint.pt", folder / "checkpoint-previous.pt"

    def numbered(self):
        """The paths of the numbered checkpoints, sorted by their epochs."""
        return sorted(self.folder.glob("checkpoint-" + 6 * "[0-9]" + ".pt"))

    def existing(self):
        """The paths of all checkpoints: first what cannot be read, then the highest epoch."""
        paths = [path for path in (self.newest, self.previous) if path.is_file()]
        return sorted(paths + self.numbered(), key=peek_epoch, reverse=True)

    def load_latest(self):
        """Load the intact checkpoint of the highest epoch.

        Returns its content, and a line for each damaged one. Raises UserError if none is intact, or
        if one is of another version; OSError if one cannot be read.
        """
        damaged = []
        for path in self.existing():
            try:
                content = load(path)
            except DamagedError as reason:
                damaged.append(str(reason))
            else:
                self.last = path, content["epoch"]
                return content, damaged
        raise UserError(f"{'; '.join(damaged)}; leave --pre-train out to start from scratch")

    def save(self, content, numbered=False):
        """Make `content` the newest checkpoint and keep the one before it as the previous one.

        numbered: whether to keep a copy under its epoch, with `keep`. A kill at any moment leaves
        this checkpoint or the one before it intact. Raises OSError.
        """
        newest_is_intact = self.last is not None and self.last[0] == self.newest
        save(self.newest, content, self.previous if newest_is_intact else None)
        self.last = self.newest, content["epoch"]
        if self.keep and numbered:
            save(self.folder / f"checkpoint-{content['epoch']:06d}.pt", content)
            for old in [*self.numbered()[: -self.keep], *self.folder.glob("checkpoint-*.pt.part")]:
                old.unlink()
