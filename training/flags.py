"""Command lines: one row per setting, with its type, range and help, for flags, checks and --help alike."""

import argparse
import numbers
import os
import sys
from typing import NamedTuple

import fgm
from fgm import InputError

# What settings may be: an interval; a tuple of them, one for each number of a pair; or a list of words.
COUNT, POSITIVE, LOGIT_NORMAL = "[1, 1e9]", "(0, 1e9]", ("[-20, 20]", "[0, 20]")
RANGES = {
    "seed": "[0, 2147483647]", "precision": ["auto", "fp32", "bf16"],
    "lr": POSITIVE, "lr_warmup": "[0, 1e9]", "lr_decay": "[0, 1]", "clip": POSITIVE, "ema_decay": "[0, 1)",
    "t_star": "(0, 1]", "c_in": "(0, 100]", "c_skip": "[0, 100]", "c_out": "(0, 100]",
    "l1_weight": "[-10, 10]", "t_generator": LOGIT_NORMAL, "t_flow": LOGIT_NORMAL, "loss_scale": POSITIVE,
    "flow_updates": "[1, 1e3]",
}


def within(number, interval):
    """Whether a number lies in an interval such as "(0, 1]"; nan lies in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    at_low, at_high = interval[0] == "[" and number == low, interval[-1] == "]" and number == high
    return low < number < high or at_low or at_high


def check_setting(name, value, allowed, whole=False):
    """Raises InputError unless value, or each number of a pair, is what is allowed. None is: not given."""
    if value is None:
        return

    if isinstance(allowed, list):
        if value not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    elif isinstance(allowed, tuple):
        if not isinstance(value, tuple | list) or len(value) != len(allowed) or None in value:
            raise InputError(f"{name} must be {len(allowed)} numbers, got {value!r}")
        for number, interval in zip(value, allowed, strict=True):
            check_setting(name, number, interval, whole)

    else:
        kind = numbers.Integral if whole else numbers.Real
        if not isinstance(value, kind) or not within(value, allowed):
            called = "a whole number in" if whole else "in"
            raise InputError(f"{name} must be {called} {allowed}, got {value!r}")


def path(text):
    """A flag's type: a path, with ~ as the user's folder."""
    return os.path.expanduser(text)


class Setting(NamedTuple):
    """One setting: its type, what it may be (as check_setting takes it), what it is for.

    kind: int, float, str, bool (a switch), argparse.BooleanOptionalAction, or None for "no_NAME", a flag that
    unsets NAME. count and metavar are argparse's nargs and metavar."""

    kind: object
    allowed: object
    help: str
    count: object = None
    metavar: object = None

    def check(self, name, value):
        """Raises InputError unless value, or every number of a list, is allowed."""
        if value == "":
            raise InputError(f"{name} is empty")
        if value is not None and self.allowed is not None:
            alone = self.count is None or isinstance(self.allowed, tuple)
            for number in [value] if alone else value:
                check_setting(name, number, self.allowed)


WEIGHTS = {"none": None, "sid": fgm.sid_weight, "noise": fgm.noise_weight}
RUN_FLAGS = {
    "resume": Setting(bool, None, "go on with the run in OUT even if settings changed"),
    "overwrite": Setting(bool, None, "start again in OUT"),
    "seed": Setting(int, RANGES["seed"], "of weights and all random draws"),
    "precision": Setting(str, RANGES["precision"], "of the passes; auto is bf16 on a GPU that has it"),
    "device": Setting(str, None, "cpu or cuda (default: cuda if there is one)"),
    "compile": Setting(bool, None, "torch.compile the networks"),
    "save_every": Setting(int, COUNT, "steps between checkpoints", metavar="STEPS"),
    "log_every": Setting(int, COUNT, "steps between lines of log.jsonl", metavar="STEPS"),
}
PICTURE_FLAG = {"picture_every": Setting(int, COUNT, "distillation steps between pictures", metavar="STEPS")}
DISTILLATION_FLAGS = {
    "batch": Setting(int, COUNT, "global batch: micro-batch x accumulation x processes"),
    "micro_batch": Setting(int, COUNT, "samples a process takes at a time (default: its share, if it fits)"),
    "lr": Setting(float, RANGES["lr"], "learning rate of the generator"),
    "flow_lr": Setting(float, RANGES["lr"], "learning rate of the online flow"),
    "lr_warmup": Setting(int, RANGES["lr_warmup"], "steps over which learning rates rise", metavar="STEPS"),
    "lr_decay": Setting(float, RANGES["lr_decay"], "last share of a phase, in which learning rates fall to 0",
                        metavar="SHARE"),
    "clip": Setting(float, RANGES["clip"], "clip every network's gradient to this norm", metavar="NORM"),
    "ema": Setting(float, RANGES["ema_decay"], "of the generator's moving average", metavar="DECAY"),
    "no_ema": Setting(None, None, "use the generator's last weights instead of their average"),
    "t_star": Setting(float, RANGES["t_star"], "t* of the generator, eq. (B.1)"),
    "c_in": Setting(float, RANGES["c_in"], "c_in of the generator, eq. (B.1)"),
    "c_skip": Setting(float, RANGES["c_skip"], "c_skip of the generator, eq. (B.1)"),
    "c_out": Setting(float, RANGES["c_out"], "c_out of the generator, eq. (B.1) (default: t*)"),
    "l1_weight": Setting(float, RANGES["l1_weight"],
                         "1: exact gradient (4.10), cheapest; 0: the paper's, images; -0.4: SiD's alpha 1.2"),
    "weight": Setting(str, list(WEIGHTS), "per sample, of the FGM loss; sid: arXiv 2404.04057, eq. 24"),
    "t_generator": Setting(float, RANGES["t_generator"], "logit-normal of t, FGM loss", 2, ("MEAN", "STD")),
    "t_flow": Setting(float, RANGES["t_flow"], "logit-normal of t in the losses of flow and GAN",
                      2, ("MEAN", "STD")),
    "loss_scale": Setting(float, RANGES["loss_scale"], "factor of the generator's loss"),
    "flow_updates": Setting(int, RANGES["flow_updates"], "updates of the online flow per generator update"),
}
TEACHER_FLAGS = {
    "teacher_lr": Setting(float, POSITIVE, "learning rate of the teacher"),
    "teacher_t": Setting(float, LOGIT_NORMAL, "logit-normal of t, teacher's loss", 2, ("MEAN", "STD")),
}


def flag(name):
    return "--" + name.replace("_", "-")


def add_flags(add, settings):
    """One flag per row; add: a parser's or group's add_argument. Defaults come from Parser.parse_with."""
    for name, setting in settings.items():
        if setting.kind is bool:
            add(flag(name), action="store_true", help=setting.help)
        elif setting.kind is None:
            dest = name.removeprefix("no_")
            add(flag(name), action="store_const", const=None, dest=dest, help=setting.help)
        elif setting.kind is argparse.BooleanOptionalAction:
            add(flag(name), action=setting.kind, help=setting.help)
        else:
            choices = setting.allowed if isinstance(setting.allowed, list) else None
            action = add(flag(name), type=setting.kind, nargs=setting.count, choices=choices,
                         metavar=setting.metavar, help=setting.help)
            action.setting = setting


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action):
        silent = action.default is None or action.nargs == 0  # no default, or a switch
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """One line on stderr and exit status 2 for a bad command line, ranges included."""

    def __init__(self, **settings):
        super().__init__(formatter_class=Help, allow_abbrev=False, **settings)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_with(self, choose, needs=lambda args: {}, modes=()):
        """The command line, with the defaults choose(what was given) -> dict, which --help shows too.

        needs(args): {flag: flags of which it needs one}; modes: {flag: the flags that mean something beside
        it}. A flag that would have no effect is refused."""
        given = [argument for argument in sys.argv[1:] if argument not in ("-h", "--help")]
        self.set_defaults(seed=0, precision="auto")
        self.set_defaults(**choose(self.parse_known_args(given)[0]))
        args = self.parse_args()
        for action in self._actions:
            if hasattr(action, "setting"):
                try:
                    action.setting.check(f"argument {action.option_strings[0]}:", getattr(args, action.dest))
                except InputError as error:
                    self.error(error)
        if getattr(args, "resume", False) and args.overwrite:
            self.error("--resume goes on with the run in OUT and --overwrite removes it: give one of them")
        words = {word.partition("=")[0] for word in sys.argv[1:]}
        for name in [action.dest for action in self._actions if words & set(action.option_strings)]:
            others = needs(args).get(name, ())
            if others and not any(getattr(args, other) for other in others):
                self.error(f"{flag(name)} means nothing without {' or '.join(map(flag, others))}")
            for mode, meaningful in dict(modes).items():
                if getattr(args, mode) and name != mode and name not in meaningful:
                    self.error(f"{flag(name)} means nothing with {flag(mode)}")
        return args


def training_settings(args):
    """What the flags mean to fgm.train_flow and fgm.distill alike."""
    return dict(batch=args.batch, micro_batch=args.micro_batch, lr_warmup=args.lr_warmup,
                lr_decay=args.lr_decay, clip=args.clip, seed=args.seed, precision=args.precision)


def teacher_settings(args):
    """What the flags mean to fgm.train_flow."""
    return training_settings(args) | dict(lr=args.teacher_lr, t_flow=tuple(args.teacher_t))


def distillation_settings(args, steps):
    """What the flags mean to fgm.distill."""
    return training_settings(args) | dict(
        steps=steps, lr=args.lr, flow_lr=args.flow_lr, ema_decay=args.ema, l1_weight=args.l1_weight,
        t_generator=tuple(args.t_generator), t_flow=tuple(args.t_flow), weight=WEIGHTS[args.weight],
        loss_scale=args.loss_scale, flow_updates=args.flow_updates)
