"""The learning rate: the maths of a schedule, advice on its numbers, and what to do about spikes."""

from launcher.schedule.advice import (
    Advice,
    Choice,
    Situation,
    advise,
    advised_schedule,
    parse_warmup,
)
from launcher.schedule.curve import (
    SHAPES,
    Schedule,
    deepspeed_blocks,
    extend_warmup,
    live_attributes,
    lower_peak,
    make_schedule,
    rate_at,
    rates,
    warmup_at,
)
from launcher.schedule.deepspeed_schedulers import simulate_deepspeed
from launcher.schedule.progress import convert_updates, rescale
from launcher.schedule.safety import check_safety, deepspeed_warnings, peak_limit
from launcher.schedule.spikes import SpikeDetector, Verdict

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
    "make_schedule",
    "parse_warmup",
    "peak_limit",
    "rate_at",
    "rates",
    "rescale",
    "simulate_deepspeed",
    "warmup_at",
]
