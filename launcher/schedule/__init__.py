"""The learning rate: schedules, advice on their numbers, safety checks and loss-spike detection."""

from launcher.schedule.advice import (
    Advice,
    Choice,
    Situation,
    advise,
    advised_schedule,
)
from launcher.schedule.curve import (
    SHAPES,
    Schedule,
    deepspeed_blocks,
    extend_warmup,
    live_attributes,
    lower_peak,
    lr_at,
    lr_curve,
    make_schedule,
    warmup_at,
)
from launcher.schedule.deepspeed_schedulers import simulate_deepspeed
from launcher.schedule.progress import convert_updates, rescale
from launcher.schedule.safety import check_safety, deepspeed_warnings, peak_limit
from launcher.schedule.spikes import SpikeDetector, Verdict
from launcher.schedule.warmup import parse_warmup

__all__ = [
    "SHAPES",
    "Advice",
    "Choice",
    "Schedule",
    "Situation",
    "SpikeDetector",
    "Verdict",
    "advise",
    "advised_schedule",
    "check_safety",
    "convert_updates",
    "deepspeed_blocks",
    "deepspeed_warnings",
    "extend_warmup",
    "live_attributes",
    "lower_peak",
    "lr_at",
    "lr_curve",
    "make_schedule",
    "parse_warmup",
    "peak_limit",
    "rescale",
    "simulate_deepspeed",
    "warmup_at",
]
