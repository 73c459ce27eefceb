"""Command lines: one row for each setting, with its type, range and help."""

import argparse
import os
import sys
from typing import NamedTuple

import fgm
from fgm import InputError

# What a setting may be: an interval; a tuple of intervals, one for each number of a pair; or a list of words.
COUNT, POSITIVE, DECAY = "[1, 1e9]", "(0, 1e9]", "[0, 1)"


def within(number, interval):
    """Whether a number lies in an interval such as "(0, 1]"; nan lies in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    at_low, at_high = interval[0] == "[" and number == low, interval[-1] == "]" and number == high
    return low < number < high or at_low or at_high


def path(text):
    """A flag's type: a path, with ~ as the user's folder."""
    return os.path.expanduser(text)


class Setting(NamedTuple):
    """One setting: its type, what it may be, its help.

    kind: int, float, str, path, bool (a switch), or argparse.BooleanOptionalAction. count and metavar are
    argparse's nargs and metavar."""

    kind: object
    allowed: object
    help: str
    count: object = None
    metavar: object = None

    def check(self, name, value):
        """Raises InputError unless value, or every number of a list, is allowed. None, not given, always is.

        Words are argparse's choices."""
        if value == "":
            raise InputError(f"{name} is empty")
        if value is None or self.allowed is None or isinstance(self.allowed, list):
            return

        numbers = value if self.count else [value]
        intervals = self.allowed if isinstance(self.allowed, tuple) else [self.allowed] * len(numbers)
        for number, interval in zip(numbers, intervals, strict=True):
            if not within(number, interval):
                raise InputError(f"{name} must be in {interval}, got {number!r}")


# ---- The settings that several commands share, everyday ones first -----------------------------------------


def logit_normal(what):
    """The setting of the distribution of a loss's t."""
    about = f"t of {what} ~ logit-normal(MEAN, STD)"
    return Setting(float, ("[-20, 20]", "[0, 20]"), about, 2, ("MEAN", "STD"))


WEIGHTS = {"none": None, "sid": fgm.sid_weight, "noise": fgm.noise_weight}
RUN_FLAGS = {
    "resume": Setting(bool, None, "resume OUT even though settings changed"),
    "overwrite": Setting(bool, None, "delete the run in OUT and start again"),
    "device": Setting(str, None, "cpu or cuda (default: cuda if there is one)"),
    "seed": Setting(int, "[0, 2147483647]", "seed of the weights and of all random draws"),
    "save_every": Setting(int, COUNT, "steps between checkpoints", metavar="STEPS"),
    "log_every": Setting(int, COUNT, "steps between lines of log.jsonl", metavar="STEPS"),
    "precision": Setting(str, ["auto", "fp32", "bf16"], "of the passes; auto: bf16 where the GPU has it"),
    "compile": Setting(bool, None, "compile the networks with torch.compile"),
}
PICTURE_FLAG = {"picture_every": Setting(int, COUNT, "distillation steps between pictures", metavar="STEPS")}
EVERYDAY_FLAGS = {
    "batch": Setting(int, COUNT, "samples of one step, over all processes"),
    "lr": Setting(float, POSITIVE, "learning rate of the generator"),
    "flow_lr": Setting(float, POSITIVE, "learning rate of the online flow"),
    "ema": Setting(float, DECAY, "decay of the generator's moving average", metavar="DECAY"),
    "no_ema": Setting(bool, None, "use the generator's last weights instead of their moving average"),
    "l1_weight": Setting(float, "[-10, 10]", "of L1 in the loss L2 + weight * L1 (1: the exact gradient, and "
                         "cheapest; 0: the paper's choice on images; -0.4: SiD's alpha of 1.2)"),
    "weight": Setting(str, list(WEIGHTS), "weight of a sample in the FGM loss (sid: arXiv 2404.04057)"),
    "t_star": Setting(float, "(0, 1]", "t* of the generator, eq. (B.1)"),
    "lr_warmup": Setting(int, "[0, 1e9]", "steps over which the learning rates rise", metavar="STEPS"),
    "lr_decay": Setting(float, "[0, 1]", "share of the run, at its end, over which learning rates fall to 0",
                        metavar="SHARE"),
}
ADVANCED_FLAGS = {
    "micro_batch": Setting(int, COUNT, "samples of one pass, fewer if memory runs out (default: a process's "
                           "share of the batch; on a GPU at most 128 in cifar.py, 4 in sd3.py)"),
    "c_in": Setting(float, "(0, 100]", "c_in of the generator, eq. (B.1)"),
    "c_skip": Setting(float, "[0, 100]", "c_skip of the generator, eq. (B.1)"),
    "c_out": Setting(float, "(0, 100]", "c_out of the generator, eq. (B.1) (default: t*)"),
    "t_generator": logit_normal("the FGM loss"),
    "t_flow": logit_normal("the losses of flow and GAN"),
    "clip": Setting(float, POSITIVE, "clip the gradient of every network to this norm", metavar="NORM"),
    "loss_scale": Setting(float, POSITIVE, "factor of the generator's loss"),
    "flow_updates": Setting(int, "[1, 1e3]", "updates of the online flow per generator update"),
}
TEACHER_FLAGS = {
    "teacher_lr": Setting(float, POSITIVE, "learning rate of the teacher"),
    "teacher_t": logit_normal("the teacher's loss"),
}


def training_settings(args):
    """The flags as settings of fgm.train_flow and fgm.distill alike."""
    return dict(batch=args.batch, micro_batch=args.micro_batch, lr_warmup=args.lr_warmup,
                lr_decay=args.lr_decay, clip=args.clip, seed=args.seed, precision=args.precision)


def teacher_settings(args):
    """The flags as settings of fgm.train_flow."""
    return training_settings(args) | dict(lr=args.teacher_lr, t_flow=tuple(args.teacher_t))


def distillation_settings(args, steps):
    """The flags as settings of fgm.distill."""
    return training_settings(args) | dict(
        steps=steps, lr=args.lr, flow_lr=args.flow_lr, ema_decay=None if args.no_ema else args.ema,
        l1_weight=args.l1_weight, weight=WEIGHTS[args.weight],
        t_generator=tuple(args.t_generator), t_flow=tuple(args.t_flow),
        loss_scale=args.loss_scale, flow_updates=args.flow_updates)


# ---- The parser --------------------------------------------------------------------------------------------


def flag(name):
    return "--" + name.replace("_", "-")


def add_flag(group, name, setting):
    """The flag of a setting, in a group of --help. Its default comes from Parser.parse_with."""
    if setting.kind is bool:
        options = dict(action="store_true")
    elif setting.kind is argparse.BooleanOptionalAction:
        options = dict(action=setting.kind)
    else:
        choices = setting.allowed if isinstance(setting.allowed, list) else None
        options = dict(type=setting.kind, nargs=setting.count, choices=choices, metavar=setting.metavar)
    action = group.add_argument(flag(name), help=setting.help, **options)
    action.setting = setting


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one, switches apart."""

    def _get_help_string(self, action):
        if action.default is None or action.nargs == 0:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Refuses a bad command line, ranges included, with one line on stderr and exit status 2.

    groups: {title in --help: {name: Setting}}; texts: argparse's prog, description, epilog."""

    def __init__(self, groups, **texts):
        super().__init__(formatter_class=Help, allow_abbrev=False, **texts)
        for title, settings in groups.items():
            group = self.add_argument_group(title)
            for name, setting in settings.items():
                add_flag(group, name, setting)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_with(self, choose, needs=None):
        """The parsed command line. choose(args as given) -> {name: default}, which --help shows, too.

        needs: {name: names of settings without any of which it is refused}."""
        words = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
        self.set_defaults(seed=0, precision="auto")
        self.set_defaults(**choose(self.parse_known_args(words)[0]))
        args = self.parse_args()

        for action in self._actions[1:]:  # the first is --help
            try:
                action.setting.check(f"argument {flag(action.dest)}:", getattr(args, action.dest))
            except InputError as error:
                self.error(error)

        if getattr(args, "resume", False) and args.overwrite:
            self.error("--resume keeps the run in OUT and --overwrite deletes it: give one of them")

        given = {word.partition("=")[0] for word in words}
        for name, others in (needs or {}).items():
            if flag(name) in given and not any(getattr(args, other) for other in others):
                self.error(f"{flag(name)} means nothing without {' or '.join(map(flag, others))}")
        return args
