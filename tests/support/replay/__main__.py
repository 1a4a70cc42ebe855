"""`python -m tests.support.replay FOLDER`: one line a case; exit 1 when any fails or none is found."""

from __future__ import annotations

import argparse
import sys
import traceback
from importlib import import_module
from pathlib import Path

from tests.support.replay import Case

FAMILIES = ("cusa", "sgraf", "uarda", "iais", "retrieval", "runs", "run_iais", "splits", "unicom")


def cases(root: Path) -> list[Case]:
    return [case for family in FAMILIES for case in import_module(f"tests.support.replay.{family}").find(root)]


def replay(case: Case) -> tuple[str, bool]:
    try:
        checks = list(case.run())
    except Exception as error:
        traceback.print_exc()
        return f"FAIL {case.name}: {type(error).__name__}: {error}", False
    results = [(check, *check.differences()) for check in checks]
    failed = [check.name for check, _, _, passed in results if not passed]
    worst_abs = max((r[1] for r in results), default=float("inf"))
    worst_rel = max((r[2] for r in results), default=float("inf"))
    passed = bool(results) and not failed
    line = f"{case.name:<48} checks {len(results):>4}  max abs {worst_abs:.2e}  max rel {worst_rel:.2e}  {'ok' if passed else 'FAIL'}"
    return line + (f"  [{', '.join(failed[:6])}{' ...' if len(failed) > 6 else ''}]" if failed else ""), passed


def main() -> int:
    parser = argparse.ArgumentParser(description="Replay golden cases against this code.")
    parser.add_argument("folder", nargs="?", default="tests/golden", type=Path)
    found = cases(parser.parse_args().folder)
    outcomes = []
    for case in found:
        line, passed = replay(case)
        print(line, flush=True)
        outcomes.append(passed)
    print(f"{sum(outcomes)} passed, {len(outcomes) - sum(outcomes)} failed")
    return 0 if outcomes and all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
