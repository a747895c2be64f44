"""No program of sampling has a branch that a GPU would ask the host about: `branches.py` in a process of its own.

XLA's GPU backend copies the predicate of a `conditional`, and of a `while` whose number of turns it does not know, to
the host and waits for it; with it waits the thread that dispatches to every mesh. Of steps, see `test_compile.py`.
"""

import pytest

STAGES = {"adjust": [], "top_k": [32], "top_p": [32], "draw": [], "score": []}  # loops, and how often each turns


@pytest.fixture(scope="module")
def found(compiled):
    return compiled("branches.py", [f"stage({name!r})" for name in STAGES])


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_of_sampling_has_no_branch_and_only_loops_of_known_length(found, stage):
    facts = found[f"stage({stage!r})"]
    assert facts["conditionals"] == 0
    assert facts["trips"] == STAGES[stage]
    # The 20 most likely tokens that scores report are found by a sort.
    assert facts["sorts"] == (1 if stage == "score" else 0)
