"""Train MoCoGAN on the clips that resize.py made.

    python resize.py                         # or resize.py --download, or resize.py --synthetic
    python main.py --epochs 40000            # a new run
    python main.py --epochs 40000 --pre-train 1     # resume it

Watch generated_videos/index.html while it runs, or `tensorboard --logdir trained_models`.
generate.py makes videos with what was trained.
"""

import contextlib
import shlex
import sys
from pathlib import Path

import torch

if __name__ == "__main__":  # a notebook may hold other modules of these names, or older ones
    for path in Path(__file__).parent.glob("*.py"):
        sys.modules.pop(path.stem, None)

import utils
from checkpoint import Checkpoints
from data import ClipDataset
from evaluate import Evaluator
from features import Features
from gallery import write_page
from logger import Logger
from trainer import Trainer, train
from utils import Parser, UserError, number
from video import save_gif, video_grid

UNRECORDED = ("pre_train", "data", "models", "videos", "seed")  # not settings of the training
NUM_EVALUATED = 256  # videos, by --evaluate-every
STOPPING = "stopping after this epoch, and saving (Ctrl-C again: at once, unsaved)"


def parse_args(argv=None):
    parser = Parser(prog="main.py", description="Train MoCoGAN on the clips of resize.py.")
    add, pretrained = parser.add_argument, "set 1 when you use pre-trained models: resume"
    add("--batch-size", type=number(int, 1, 10**6), default=16, help="set batch_size")
    add("--epochs", type=number(int, 1, 999_999), default=40_000, help="set num of iterations")
    add("--pre-train", type=number(int, -1, 1), default=-1, help=pretrained)
    add("--frames", type=number(int, 16), default=16, help="T, the frames of a window")
    add("--lr", type=number(float, 1e-12, 1), default=2e-4, help="learning rate of Adam")
    add("--ema", type=number(float, 0, 0.999999), default=0.999, help="decay of the average, or 0")
    add("--noise-sigma", type=number(float, 0, 10), default=0.0, help="noise on what D_I, D_V see")
    add("--augment", action="store_true", help="DiffAugment on what D_I and D_V see")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of all random numbers")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=utils.PRECISIONS, default="auto", help="auto: bf16 if native")
    add("--data", type=Path, default="resized_data", help="folder of clips, from resize.py")
    add("--models", type=Path, default="trained_models", help="folder for checkpoint and losses")
    add("--videos", type=Path, default="generated_videos", help="folder for the sample GIFs")
    add("--sample-every", type=number(int, 1), default=1000, help="epochs between sample GIFs")
    add("--checkpoint-every", type=number(int, 1), default=5000, help="epochs between checkpoints")
    add("--checkpoint-minutes", type=number(float, 0), default=10.0, help="the same, by the clock")
    add("--evaluate-every", type=number(int, 0), default=0, help="epochs between measurements")
    add("--keep", type=number(int, 0), default=0, help="how many numbered checkpoints to keep")
    add("--deterministic", action="store_true", help="same bits on a GPU; the CPU always does")
    return parser.parse_args(argv)


def run(args, checkpoints, resume_command):
    """Train as `args` say, and save to `checkpoints`. resume_command: what resumes the run."""
    device = utils.pick_device(args.device)
    precision = utils.pick_precision(args.precision, device)
    utils.set_up_device(device, args.deterministic)
    if args.pre_train == 1 and not checkpoints.existing():
        raise UserError(f"--pre-train 1: no {checkpoints.newest}; name its folder with --models")
    clips = ClipDataset(args.data, args.frames)
    for line in clips.skipped:
        print(f"skipped {line}")

    evaluator = None
    if args.evaluate_every:
        networks = [Features("efficientnet_lite0", device)]
        evaluator = Evaluator(clips, networks, NUM_EVALUATED, device=device)
    with utils.lock_folders(args.models, args.videos), utils.graceful_stop(STOPPING) as stop:
        recipe = args.ema, args.noise_sigma, args.augment
        trainer = Trainer(clips, args.batch_size, args.lr, args.seed, device, precision, *recipe)
        info = {"settings": settings(args, clips, device, precision), "data": clips.fingerprint()}
        history = evaluations = None
        if args.pre_train == 1:
            history, evaluations = resume(trainer, checkpoints, info)
            if trainer.seed != args.seed:
                print(f"note: --seed {args.seed} has no effect: this run has {trainer.seed}")
            if trainer.epoch >= args.epochs:
                print(f"note: the run is at epoch {trainer.epoch} already; raise --epochs")
        else:
            for path in utils.archive_run(args.models, args.videos):
                print(f"moved an older run to {path}")

        facts = describe(args, trainer, info["settings"])
        for name, line in facts.items():
            print(f"{name:<10}{line}")
        save_gif(args.videos / "real.gif", video_grid(trainer.sample_real().numpy()))
        if evaluator:
            metrics = (f"{name} {value:.4g}" for name, value in evaluator.real_metrics.items())
            facts["real"] = f"other real windows: {', '.join(metrics)}"
        with Logger(args.models, history, evaluations) as log:
            if log.board_error:
                print(f"note: nothing goes to TensorBoard ({log.board_error})")
            try:
                train(trainer, args, log, facts, checkpoints, info, stop, evaluator)
            except BaseException as error:
                with contextlib.suppress(OSError):
                    write_page(args, trainer.epoch, log, facts, f"stopped by {error!r}")
                raise
            done = trainer.epoch >= args.epochs
            write_page(args, trainer.epoch, log, facts, "done" if done else "stopped")
    if done:
        print(f"done: {args.videos / f'epoch-{trainer.epoch:06d}.gif'}, {checkpoints.newest}")
    else:
        saved = f"stopped after epoch {trainer.epoch}, saved to {checkpoints.newest}"
        utils.exit_with(128 + stop[0], f"{saved}; to resume:\n{resume_command}")


def settings(args, clips, device, precision):
    """What a run depends on; a change is printed when it resumes."""
    flags = {name: value for name, value in vars(args).items() if name not in UNRECORDED}
    return {
        "size": clips.size,
        **flags,
        "device": device.type,
        "precision": precision,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def resume(trainer, checkpoints, info):
    """Load the newest intact checkpoint and report settings that changed.

    Returns its history and its evaluations. Raises UserError if there is none, or if it is of other
    networks.
    """
    state, damaged = checkpoints.load_latest()
    path, epoch = checkpoints.last
    for line in damaged:
        print(f"warning: {line}")
    print(f"resuming from {path}, epoch {epoch}")
    try:
        for name, value in info["settings"].items():
            if state["settings"].get(name) != value:
                print(f"note: {name} was {state['settings'].get(name)}, is {value} now")
        trainer.load_state(state)
        then, now = state["data"], info["data"]
        if then != now:
            was, is_now = (f"{data['clips']} with {data['frames']} frames" for data in (then, now))
            print(f"note: the clips have changed, in name or content: {was} then, {is_now} now")
        return state["history"], state.get("evaluations")
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if utils.is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        message = f"{path}: cannot resume from it ({reason}); leave --pre-train out to start again"
        raise UserError(message) from error


def describe(args, trainer, settings):
    """What is trained, on what, and where to look: a dict of lines by subject."""
    clips = trainer.clips
    where = settings["gpu"] or f"{settings['device']}, {settings['threads']} threads"
    actions = f"{len(clips.actions)} actions ({' '.join(clips.actions)})"
    sizes = (
        f"{name} {sum(param.numel() for param in net.parameters()):,}"
        for name, net in trainer.networks.items()
    )
    return {
        "device": f"{where}, {settings['precision']}",
        "data": f"{args.data}: {len(clips)} clips, {clips.num_frames} frames of "
        f"{clips.size}×{clips.size}, {actions if clips.actions else 'no action folders'}",
        "networks": f"{', '.join(sizes)} parameters",
        "output": f"{args.videos}/index.html shows the run, checkpoints are in {args.models}",
        "training": f"batch {args.batch_size}, epoch {trainer.epoch} of {args.epochs}",
    }


def main(argv=None):
    args = parse_args(argv)
    checkpoints = Checkpoints(args.models, args.keep)
    command = ["%run", *sys.argv] if utils.IN_IPYTHON else sys.orig_argv
    if argv is not None:
        command = ["python", "main.py", *argv]
    resume_command = shlex.join([*command, *["--pre-train", "1"] * (args.pre_train != 1)])

    def advice():
        safe = "; {} of epoch {} is safe; to resume: {}"
        return safe.format(*checkpoints.last, resume_command) if checkpoints.last else ""

    with utils.one_line_errors("main.py", "take a smaller --batch-size", advice):
        run(args, checkpoints, resume_command)


if __name__ == "__main__":
    main()
