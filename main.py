"""Train MoCoGAN on the clips that resize.py made.

    python resize.py                         # or resize.py --download, or resize.py --synthetic
    python main.py --epochs 40000            # a new run
    python main.py --epochs 40000 --pre-train 1     # go on with it after it was cut off

Look at generated_videos/*.gif and trained_models/losses.png while it runs, or at both with
`tensorboard --logdir trained_models`.
"""

from pathlib import Path

import torch

from data import ClipDataset
from trainer import Trainer, parameters, train
from utils import (
    LossLog,
    Parser,
    UserError,
    move_old_run,
    number,
    one_line_errors,
    save_gif,
    set_up_machine,
    video_grid,
)

EPOCHS, SAMPLE_EVERY, CHECKPOINT_EVERY = 40_000, 1000, 5000  # the defaults


def parse(argv=None):
    parser = Parser(prog="main.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--batch-size", type=number(int, 1), default=16, help="set batch_size")
    add("--epochs", type=number(int, 1), default=EPOCHS, help="set num of iterations")
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
    add("--data", type=Path, default="resized_data", help="folder of clips, from resize.py")
    add("--models", type=Path, default="trained_models", help="folder for checkpoint and losses")
    add("--videos", type=Path, default="generated_videos", help="folder for the sample GIFs")
    count = number(int, 1)
    add("--sample-every", type=count, default=SAMPLE_EVERY, help="epochs between sample GIFs")
    add(
        "--checkpoint-every",
        type=count,
        default=CHECKPOINT_EVERY,
        help="epochs between checkpoints",
    )
    return parser, parser.parse_args(argv)


def pick_device(name):
    """The torch device called `name`, with its index; "auto" takes CUDA, else MPS, else the CPU."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {name}: there is no such device here; try auto") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: one of auto, cpu, cuda, cuda:1, mps")
    return device


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


def run(args):
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    checkpoint = args.models / "checkpoint.pt"
    for folder in (args.models, args.videos):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is not a folder")
    if args.pre_train == 1 and not checkpoint.is_file():
        raise UserError(
            f"--pre-train 1: {checkpoint} is not there; leave the flag out to start anew"
        )

    clips = ClipDataset(args.data, args.frames)
    for line in clips.skipped:
        print(f"left out: {line}")
    set_up_machine(device)
    trainer = Trainer(
        clips, args.batch_size, args.lr, args.seed, device, precision, graph=not args.no_graph
    )
    args.models.mkdir(parents=True, exist_ok=True)
    args.videos.mkdir(parents=True, exist_ok=True)
    settings = {
        "size": clips.size,
        "frames": args.frames,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "seed": args.seed,
        "precision": precision,
    }
    if args.pre_train == 1:
        for line in trainer.load(checkpoint, settings):
            print(f"note: {line}")
    else:
        for folder in move_old_run(args.models, args.videos):
            print(f"an older run was moved to {folder}")

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu":
        where += f", {torch.get_num_threads()} threads"
    actions = f"{len(clips.actions)} actions ({' '.join(clips.actions)})"
    print(f"device    {where}, {precision}")
    print(
        f"data      {args.data}: {len(clips)} clips, {clips.lengths.sum()} frames "
        f"of {clips.size}×{clips.size}, {actions if clips.actions else 'no action folders'}"
    )
    sizes = (f"{name} {parameters(net):,}" for name, net in trainer.networks.items())
    print(f"networks  {', '.join(sizes)} parameters")
    print(
        f"output    {args.videos}: a GIF every {args.sample_every} epochs; "
        f"{args.models}: a checkpoint every {args.checkpoint_every}, losses.csv, losses.png"
    )
    if trainer.epoch >= args.epochs:
        print(f"nothing to do: {checkpoint} is at epoch {trainer.epoch}; raise --epochs to go on")
        return
    print(f"training  batch {args.batch_size}, epochs {trainer.epoch + 1} to {args.epochs}")

    if not (args.videos / "real.gif").exists():
        save_gif(args.videos / "real.gif", video_grid(trainer.real_sample(args.seed)))
    log = LossLog(args.models, trainer.epoch)
    try:
        train(
            trainer,
            args.epochs,
            log,
            save_checkpoint=lambda: trainer.save(checkpoint, settings),
            videos=args.videos,
            sample_every=args.sample_every,
            checkpoint_every=args.checkpoint_every,
        )
    except KeyboardInterrupt:
        if checkpoint.exists():
            print(f"\n{checkpoint} is safe; --pre-train 1 goes on from it")
        else:
            print(f"\nno checkpoint had been made by epoch {trainer.epoch}: see --checkpoint-every")
        raise
    finally:
        log.close()
    print(f"done: {args.videos / f'epoch-{trainer.epoch:06d}.gif'}, {checkpoint}")


def main(argv=None):
    parser, args = parse(argv)
    with one_line_errors(parser):
        run(args)


if __name__ == "__main__":
    main()
