"""Commands of train.py, one after another, each in a process of its own, forked when everything slow is imported.

They write no report: its pictures would take most of the time.
"""

import json
import os
import sys
from pathlib import Path
from unittest import mock

from sadm_fast.train import main


def forked(arguments: list[str]) -> int:
    """The exit code of train.py with these arguments."""
    child = os.fork()
    if not child:
        code = 1
        try:
            with mock.patch("sadm_fast.trainer.write_report"):
                code = main(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        assert forked(arguments) == 0, arguments
