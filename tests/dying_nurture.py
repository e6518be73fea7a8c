"""`nurture`, one process of which is killed before an update, the first time that torchrun starts it.

python -m torch.distributed.run ... dying_nurture.py RANK:UPDATES [the words of a nurture command]
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from nurture import cli, trainer

if __name__ == "__main__":
    rank, updates = sys.argv.pop(1).split(":")
    left, train_step = iter(range(int(updates))), trainer.train_step

    def last_updates(*args: Any, **options: Any) -> trainer.StepReport:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(*args, **options)

    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (rank, "0"):
        trainer.train_step = last_updates
    cli.main()
