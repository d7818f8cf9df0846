"""Train MoCoGAN on the clips that resize.py made.

    python resize.py                         # or resize.py --download, or resize.py --synthetic
    python main.py --epochs 40000            # a new run
    python main.py --epochs 40000 --pre-train 1     # go on with it after it was cut off

Look at generated_videos/index.html while it runs, or at `tensorboard --logdir trained_models`.
generate.py makes videos with what was trained.
"""

import contextlib
import re
import shlex
import sys
from pathlib import Path

import torch

from checkpoint import Checkpoints, Damaged, read, write
from data import ClipDataset
from gallery import Page
from trainer import Trainer, parameters, train
from utils import (
    IN_IPYTHON,
    LossLog,
    Parser,
    TrainingError,
    UserError,
    alone_in,
    end,
    folder,
    is_out_of_memory,
    move_old_run,
    number,
    one_line_errors,
    pick_device,
    remove_parts,
    set_up_machine,
    signals_noted,
    what_failed,
)
from video import save_gif, video_grid

NO_FLAGS = "size", "torch", "threads", "gpu", "clips_in_gpu"  # settings that come about
# the defaults
EPOCHS, SAMPLE_EVERY, CHECKPOINT_EVERY, CHECKPOINT_MINUTES = 40_000, 1000, 5000, 10.0


def parse(argv=None):
    parser = Parser(prog="main.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--batch-size", type=number(int, 1, 10**6), default=16, help="set batch_size")
    add("--epochs", type=number(int, 1, 10**9), default=EPOCHS, help="set num of iterations")
    add(
        "--pre-train",
        type=number(int, -1, 1),
        default=-1,
        help="set 1 when you use pre-trained models: go on from the checkpoint in --models",
    )
    add("--frames", type=number(int, 16), default=16, help="T, the frames of a window")
    add("--lr", type=number(float, 1e-12, 1), default=2e-4, help="learning rate of Adam")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of everything that is random")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of the convolutions; auto: bf16 where the hardware has it, else fp32",
    )
    add("--no-graph", action="store_true", help="on CUDA, train kernel by kernel, for debugging")
    add("--data", type=folder, default="resized_data", help="folder of clips, from resize.py")
    add("--models", type=folder, default="trained_models", help="folder for checkpoint and losses")
    add("--videos", type=folder, default="generated_videos", help="folder for the sample GIFs")
    count = number(int, 1)
    add("--sample-every", type=count, default=SAMPLE_EVERY, help="epochs between sample GIFs")
    add(
        "--checkpoint-every",
        type=count,
        default=CHECKPOINT_EVERY,
        help="epochs between checkpoints",
    )
    add(
        "--checkpoint-minutes",
        type=number(float, 0),
        default=CHECKPOINT_MINUTES,
        help="minutes after which there is a checkpoint anyway",
    )
    add("--keep", type=number(int, 0), default=0, help="how many numbered checkpoints to keep, too")
    add(
        "--deterministic",
        action="store_true",
        help="on a GPU, give the same bits every time, more slowly and without a CUDA graph; "
        "the CPU always does",
    )
    return parser, parser.parse_args(argv)


def pick_precision(name, device):
    """The precision called `name`; "auto" takes bf16 where `device` has it natively, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        flags = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
        native = any(getattr(torch.cpu, flag, lambda: False)() for flag in flags)
    else:
        native = False
    return "bf16" if native else "fp32"


def run(args, to_go_on):
    """Train as `args` say. to_go_on: the command that goes on where this one was stopped."""
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    for path in (args.models, args.videos):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is not a folder")
    checkpoints = Checkpoints(args.models, args.keep)
    if args.pre_train == 1 and not checkpoints.there():
        raise UserError(
            f"--pre-train 1: {checkpoints.newest} is not there; name its folder with --models, "
            "or leave the flag out to start anew"
        )
    clips = ClipDataset(args.data, args.frames)
    for line in clips.skipped:
        print(f"left out: {line}")
    set_up_machine(device, args.deterministic)

    with alone_in(args.models, args.videos), one_line_failures(checkpoints, to_go_on):
        graph = not (args.no_graph or args.deterministic)
        trainer = Trainer(clips, args.batch_size, args.lr, args.seed, device, precision, graph)
        settings = {
            "size": clips.size,
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "clips_in_gpu": trainer.ahead is None,
            "frames": args.frames,
            "batch_size": args.batch_size,
            "lr": args.lr,
            "epochs": args.epochs,
            "sample_every": args.sample_every,
            "checkpoint_every": args.checkpoint_every,
            "checkpoint_minutes": args.checkpoint_minutes,
            "keep": args.keep,
            "device": device.type,
            "precision": precision,
            "deterministic": args.deterministic,
        }
        data = clips.fingerprint()
        remove_parts(args.models, args.videos)
        if args.pre_train == 1:
            go_on(trainer, checkpoints, settings, data)
            see_to_generator(args.models / "generator.pt", trainer)
            if trainer.seed != args.seed:
                print(f"note: --seed {args.seed} has no effect: this run has {trainer.seed}")
            if trainer.epoch >= args.epochs:
                path = checkpoints.good[0]
                print(f"nothing to do: {path} is at epoch {trainer.epoch}; raise --epochs to go on")
                return
        else:
            for path in move_old_run(args.models, args.videos):
                print(f"an older run was moved to {path}")
        facts = describe(args, trainer, precision, checkpoints.good and checkpoints.good[0])
        for name, line in facts.items():
            print(f"{name:<10}{line}")
        if not (args.videos / "real.gif").exists():
            save_gif(args.videos / "real.gif", video_grid(trainer.real_sample(args.seed)))

        with (
            signals_noted() as stop,
            LossLog(args.models, trainer.epoch) as log,
            Page(args.videos, trainer, args.epochs, log, facts) as page,
        ):

            def show():
                log.plot()
                page.write()

            def save():
                state = trainer.state()
                log.sync()
                regular = trainer.epoch % args.checkpoint_every == 0
                checkpoints.save({**state, "settings": settings, "data": data}, number=regular)
                write(args.models / "generator.pt", trainer.generator_state())

            train(
                trainer,
                args.epochs,
                log,
                save_checkpoint=save,
                videos=args.videos,
                sample_every=args.sample_every,
                checkpoint_every=args.checkpoint_every,
                checkpoint_seconds=args.checkpoint_minutes * 60,
                stop=stop,
                show=show,
            )
    if trainer.epoch < args.epochs:
        told = f"stopped after epoch {trainer.epoch}, saved to {checkpoints.newest}; to go on:"
        return end(128 + stop[0], f"{told}\n{to_go_on}")
    print(f"done: {args.videos / f'epoch-{trainer.epoch:06d}.gif'}, {checkpoints.newest}")


def go_on(trainer, checkpoints, settings, data):
    """Bring `trainer` to the newest sound checkpoint, and say what is another now than it was.

    settings, data: those of now, as they stand in a checkpoint. Raises UserError if no checkpoint
    is sound, or if that one is of other networks or of clips of another shape.
    """
    state, damaged = checkpoints.load()
    path, epoch = checkpoints.good
    for line in damaged:
        print(f"warning: {line}")
    if path != checkpoints.newest:
        print(f"warning: going on from {path}, of epoch {epoch}")
    try:
        old, old_data = state["settings"], state["data"]
        changed = {
            name: f"{flag(name)} was {old.get(name)}, is {value} now"
            for name, value in settings.items()
            if old.get(name) != value
        }
        other = [changed.pop(name) for name in ("size", "frames") if name in changed]
        other += trainer.differences(state)
        if other:
            raise UserError(
                f"{path}: cannot go on with other networks: {'; '.join(other)}; go on with what it "
                "began with, or leave --pre-train out to start anew"
            )
        trainer.load_state(state)
        for line in changed.values():
            print(f"note: {line}")
        if data != old_data:
            print(
                f"note: the clips are not those of the checkpoint, in name or content: "
                f"{old_data['clips']} of {old_data['frames']} frames then, "
                f"{data['clips']} of {data['frames']} now"
            )
    except (AttributeError, LookupError, TypeError, ValueError) as reason:
        raise UserError(f"{path}: not a checkpoint that main.py wrote ({reason!r})") from reason


def see_to_generator(path, trainer):
    """Write generator.pt, if it is not the checkpoint's: a run may have ended between the two."""
    with contextlib.suppress(Damaged, OSError, UserError):
        if read(path)["epoch"] == trainer.epoch:
            return
    write(path, trainer.generator_state())


def flag(setting):
    """The flag that sets it, where one does."""
    return f"--{setting.replace('_', '-')}" if setting not in NO_FLAGS else setting


def describe(args, trainer, precision, checkpoint):
    """What is trained, on what, and where to look: a dict of lines, by what they are about.

    checkpoint: the path that it goes on from, or None.
    """
    after = f", from {checkpoint}" if checkpoint else ""
    device, clips = trainer.device, trainer.clips
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu":
        where += f", {torch.get_num_threads()} threads"
    actions = f"{len(clips.actions)} actions ({' '.join(clips.actions)})"
    sizes = (f"{name} {parameters(net):,}" for name, net in trainer.networks.items())
    return {
        "device": f"{where}, {precision}",
        "data": f"{args.data}: {len(clips)} clips, {clips.number_of_frames} frames "
        f"of {clips.size}×{clips.size}, {actions if clips.actions else 'no action folders'}",
        "networks": f"{', '.join(sizes)} parameters",
        "output": f"{args.videos}: a GIF every {args.sample_every} epochs, all of them in "
        f"index.html; {args.models}: a checkpoint every {args.checkpoint_every} or "
        f"{args.checkpoint_minutes:g} minutes, generator.pt, losses.csv, losses.png",
        "training": f"batch {args.batch_size}, epochs {trainer.epoch + 1} to {args.epochs}{after}",
    }


@contextlib.contextmanager
def one_line_failures(checkpoints, to_go_on):
    """Say in one line what ended a training, what is safe, and what to do."""

    def what_is_safe(then):
        after = f"; to go on{then}: {to_go_on}" if checkpoints.good else ""
        return checkpoints.safe() + after

    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped at once; {what_is_safe('')}") from None
    except (TrainingError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, TrainingError):
            what = str(error)
        elif is_out_of_memory(error):
            what = f"not enough memory{asked_for(error)}: take a smaller --batch-size"
        elif isinstance(error, OSError):
            what = what_failed(error)
        else:
            raise
        raise TrainingError(f"{what}; {what_is_safe(' after that')}") from error


def asked_for(error):
    """How much memory there was not, as far as `error` says it."""
    found = re.search(r"tried to allocate ([\d.]+) (\w+)", str(error), re.IGNORECASE)
    if not found:
        return ""
    amount, unit = found.groups()
    return f" for {int(amount) / 1e9:.3g} GB" if unit == "bytes" else f" for {amount} {unit}"


def main(argv=None):
    parser, args = parse(argv)
    command = sys.argv if argv is None else [parser.prog, *argv]
    if args.pre_train != 1:
        command = [*command, "--pre-train", "1"]
    program = "%run" if IN_IPYTHON else Path(sys.executable).name
    with one_line_errors(parser):
        run(args, f"{program} {shlex.join(command)}")


if __name__ == "__main__":
    main()
