"""The evidence that comes from Triton's interpreter, which must be asked for before Python starts.

    TRITON_INTERPRET=1 python benchmarks/static/interpreted.py REGEX [--rivals]

prints a JSON of the traffic of each op and the launches of each pass whose names match; with --rivals, of the bytes
that our calls in the comparison with rivals move.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
import launches
import rivals
import traffic


def main() -> None:
    """The command."""
    if "--rivals" in sys.argv[2:]:
        print(json.dumps(rivals.moved()))
        return
    only = re.compile(sys.argv[1])
    found = {
        "traffic": {case.name: traffic.figures(case) for case in traffic.calls() if only.search(case.name)},
        "launches": {name: figures for name, figures in launches.passes().items() if only.search(name)},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
