"""Named points at which the tests of durability kill a process. Without the variable they do nothing.

DS_ZOADAMU_CRASH_AT=name:step          every rank that gets there
DS_ZOADAMU_CRASH_AT=name:step:rank     that rank only
"""

import os
import signal

VARIABLE = "DS_ZOADAMU_CRASH_AT"

STEP_POINTS = ("before_append", "after_append", "after_fsync", "mid_update")
SAVE_POINTS = ("save_begun", "save_in_file", "save_files", "save_manifest", "save_renamed", "save_latest", "save_pruned")
FOLDER_POINTS = ("save_manifest", "replacing", "save_renamed", "save_latest", "save_pruning")
"""Between two acts that change a folder of checkpoints."""


def reach(name: str, step: int) -> None:
    """Kill this process with SIGKILL where the variable names this point and step (and rank)."""
    target = os.environ.get(VARIABLE)
    if target is None:
        return
    wanted, wanted_step, *rank = target.split(":")
    if name == wanted and step == int(wanted_step) and (not rank or rank[0] == os.environ.get("RANK", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
