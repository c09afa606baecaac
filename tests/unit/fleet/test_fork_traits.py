"""What must be equal for a fork of another process to be as a child of this one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.fleet.fork_traits import Traits, differing_variables


@pytest.mark.parametrize(
    "name",
    [
        *(
            "OMP_NUM_THREADS",
            "MKL_NUM_THREADS",
            "HF_HOME",
            "HF_HUB_OFFLINE",
            "TOKENIZERS_PARALLELISM",
            "DS_ACCELERATOR",
        ),
        *(
            "TORCH_HOME",
            "TORCHINDUCTOR_CACHE_DIR",
            "PYTORCH_CUDA_ALLOC_CONF",
            "CUDA_HOME",
            "LD_PRELOAD",
            "LD_LIBRARY_PATH",
        ),
        *("PYTHONPATH", "PATH", "HOME", "MY_OWN", "_MINE", "PWD_FILE"),
    ],
)
def test_a_variable_that_imports_may_read_must_be_equal(name: str) -> None:
    assert differing_variables({name: "1"}, {name: "2"}) == [name]
    assert differing_variables({name: "1"}, {}) == [name]
    assert differing_variables({}, {name: "2"}) == [name]
    assert differing_variables({name: "1"}, {name: "1"}) == []


@pytest.mark.parametrize(
    "name",
    ["RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "LAUNCHER_RUN_DIR", "RAY_ADDRESS", "_", "SSH_TTY"],
)
def test_a_variable_that_is_read_later_may_differ(name: str) -> None:
    assert differing_variables({name: "1"}, {name: "2"}) == differing_variables({}, {name: "2"}) == []


def test_a_process_has_its_own_traits() -> None:
    assert Traits.here().differences(Traits.here()) == []


def test_niceness_and_the_preference_of_the_oom_killer_can_only_be_raised() -> None:
    low = replace(Traits.here(), raisable={"niceness": 0, "oom_score_adj": 0})
    high = replace(low, raisable={"niceness": 15, "oom_score_adj": 1000})
    assert low.differences(high) == []
    assert high.differences(low) == ["niceness", "oom_score_adj"]


@pytest.mark.parametrize(
    "name", ["machine", "user", "Python", "control group", "processors", "net namespace", "hard limit RLIMIT_AS"]
)
def test_the_machine_the_user_and_limits_must_be_equal(name: str) -> None:
    here = Traits.here()
    other = replace(here, fixed={**here.fixed, name: "other"})
    assert here.differences(other) == other.differences(here) == [name]
